"""What a chat template mentions: what it does not mention, it would drop without a word."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from fastserve.errors import RequestError


@dataclass(frozen=True)
class TemplateNames:
    """The names in a template."""

    variables: frozenset[str]
    """What it takes from outside, such as `messages`, `tools`, `enable_thinking`."""
    members: frozenset[str]
    """What it may look up in a message: its attributes and strings."""


@cache
def template_names(source: str) -> TemplateNames:
    """The names in a template. Raises RequestError if it cannot be read."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    try:
        tree = environment.parse(source)
    except TemplateError as error:
        raise RequestError(f"`messages`: the model's chat template cannot be read: {error}") from error
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateNames(frozenset(meta.find_undeclared_variables(tree)), frozenset(attributes | texts))


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`, with which transformers marks an assistant's tokens."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
