#!/bin/sh
# llguidance: a JSON number with a bound can no longer be written with an exponent, and annotations are refused.
#
# Expected: {"type": "number", "minimum": 0} allows every number from 0 on, 1e2 too; JSON Schema lets a validator take
# a `format` that it does not know (password, uri-reference: the latter is one of the specification's own) as an annotation.
# Seen with 1.9.1: with `minimum`, `maximum` or either exclusive bound "1e2" is rejected, without one it is
# accepted; an unknown format is an error, unless the grammar is made lenient.
# FastServe validates and compiles schemas with it (text/guide.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer

TOKENIZER = LLTokenizer("byte")


def verdict(schema, text):
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    if matcher.is_error():
        return matcher.get_error().splitlines()[0]
    tokens = TOKENIZER.tokenize_bytes(text.encode())
    return "accepted" if matcher.validate_tokens(tokens) == len(tokens) else "rejected"


print("llguidance", version("llguidance"))
seen = {}
for bound in ({}, {"minimum": 0}, {"maximum": 1000}, {"exclusiveMinimum": 0}):
    seen |= {(str(bound), text): verdict({"type": "number", **bound}, text) for text in ("100", "1e2")}
for name in ("password", "uri-reference"):
    seen[name, "abc"] = verdict({"type": "string", "format": name}, '"abc"')
for case, came in seen.items():
    print(*case, "->", came)
for (bound, text), came in seen.items():
    if text == "abc":
        assert came == f"Unknown format: {bound}", "changed: the format is known, or taken as an annotation"
    else:
        assert came == ("rejected" if text == "1e2" and bound != "{}" else "accepted"), "changed"
PY
