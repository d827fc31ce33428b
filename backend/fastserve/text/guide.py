"""Guided decoding: from a request's guide to the grammar that llguidance compiles."""

from __future__ import annotations

import re

from llguidance import LLMatcher

from fastserve.types import Guide

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")


def grammar_of(guide: Guide) -> str:
    """The llguidance grammar of a guide, for `LLMatcher`.

    It may be malformed, as the guide may, or too much for its compiler: `GuideValidator` tells.
    """
    if guide.json is not None:
        return LLMatcher.grammar_from_json_schema(guide.json)
    if guide.regex is not None:
        return LLMatcher.grammar_from_regex(guide.regex)
    if guide.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_escaped, guide.choice)))
    assert guide.grammar is not None
    return LLMatcher.grammar_from_lark(guide.grammar)


def _escaped(literal: str) -> str:
    """A regex that matches just `literal`."""
    return _SPECIAL.sub(lambda match: "\\" + match[0], literal)
