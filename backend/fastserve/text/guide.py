"""Guided decoding: from a request's guide to the grammar that llguidance compiles."""

from __future__ import annotations

import re

from llguidance import LLMatcher

from fastserve.errors import RequestError
from fastserve.types import Guide

MAX_GUIDE_CHARACTERS = 256 * 1024
"""Of one grammar. With llguidance's own limits it bounds a compilation to about a second."""
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")


def grammar_of(guide: Guide) -> str:
    """The llguidance grammar of a guide, for `LLMatcher`.

    It may be malformed, as the guide may: `validate_guide` tells.
    """
    if guide.json is not None:
        return LLMatcher.grammar_from_json_schema(guide.json)
    if guide.regex is not None:
        return LLMatcher.grammar_from_regex(guide.regex)
    if guide.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_escaped, guide.choice)))
    assert guide.grammar is not None
    return LLMatcher.grammar_from_lark(guide.grammar)


def validate_guide(guide: Guide, field: str) -> None:
    """Compiles the guide. Raises RequestError, naming `field`, with what llguidance says of it."""
    grammar = grammar_of(guide)
    if len(grammar) > MAX_GUIDE_CHARACTERS:
        raise RequestError(
            f"`{field}`: got a grammar of {len(grammar)} characters; allowed: at most {MAX_GUIDE_CHARACTERS}"
        )
    message = LLMatcher.validate_grammar(grammar)
    if message:
        raise RequestError(f"`{field}`: it does not compile: {message[:500]}")


def _escaped(literal: str) -> str:
    """A regex that matches just `literal`."""
    return _SPECIAL.sub(lambda match: "\\" + match[0], literal)
