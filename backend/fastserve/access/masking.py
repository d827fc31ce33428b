"""Masks what of a text should not be written down: addresses, numbers of phones, cards and accounts, keys.

`phonenumbers`, `python-stdnum` (check digits of cards and IBANs) and `detect-secrets` (the forms of
providers' keys) decide; they are of the extra `masking`. Where they leave doubt, more is masked rather than
less: `docs/access.md` says what is missed all the same.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from fastserve.access.key import PREFIX

MAX_CHARACTERS = 1 << 16
"""Of a text; what is beyond is cut off, at a space."""
PHONE_REGIONS: Sequence[str] = ("US", "GB", "DE", "FR", "ES", "IT", "IN", "JP", "BR", "AU")
"""Whose national forms are known; numbers with a `+` are, wherever they are of."""
MIN_TOKEN_LENGTH = 20
"""Characters of a run of letters and digits in which words do not come, from which it counts as a key."""

_EMAIL = re.compile(r"""[^\s@<>"'(),:;\[\]]+@[^\s@<>"'(),:;\[\]]+\.[^\W\d_]{2,}""")
_CARD = re.compile(r"(?<!\d)(?:\d[ -]?){11,18}\d(?!\d)")
_IBAN = re.compile(r"\b[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,3})?\b")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S
)
_NAMED = re.compile(
    r"""(?ix) \b (?: (?:api|access)[_ -]?key | secret (?:[_ -]?key)? | token | passw(?:or)?d | passwd | pwd )
    ["']? (?: \s*(?::=|=>|[:=])\s* | \s+is\s+ ) ["']? (?P<value> (?! \S+ [:=] (?:\s|$) ) [^\s"',;]{4,} )"""
)
_BEARER = re.compile(r"(?i)\b(?:bearer|basic)\s+(?P<value>[A-Za-z0-9._~+/=-]{8,})")
_RUN = re.compile(rf"[A-Za-z0-9_+/=-]{{{MIN_TOKEN_LENGTH},}}")
_OWN_KEY = re.compile(rf"\b{PREFIX}_[A-Za-z0-9_-]+")

Span = tuple[int, int, str]
"""Where a thing begins and ends, and what it is."""


def mask(text: str) -> str:
    """The text with `[KIND]` in place of each thing that was found. Raises ImportError without the extra."""
    text = _cut(text)
    masked, end = [], 0
    for start, stop, kind in _merged(_spans(text)):
        masked += [text[end:start], f"[{kind}]"]
        end = stop
    return "".join([*masked, text[end:]])


def check_masking() -> None:
    """Raises ImportError where a library of the extra `masking` is missing."""
    import phonenumbers  # noqa: F401
    import stdnum  # noqa: F401

    _key_patterns()


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    # A thing that the cut goes through could not be known by its rest.
    return text[:MAX_CHARACTERS].rsplit(None, 1)[0]


def _spans(text: str) -> Iterator[Span]:
    yield from _matches(_PRIVATE_KEY, text, "KEY")
    yield from _matches(_EMAIL, text, "EMAIL")
    yield from _ibans(text)
    yield from _cards(text)
    yield from _phones(text)
    for pattern in (_OWN_KEY, _NAMED, _BEARER, *_key_patterns()):
        yield from _matches(pattern, text, "KEY")
    yield from ((*found.span(), "KEY") for found in _RUN.finditer(text) if _is_random(found[0]))


def _matches(pattern: re.Pattern[str], text: str, kind: str) -> Iterator[Span]:
    group = "value" if "value" in pattern.groupindex else 0
    return ((*found.span(group), kind) for found in pattern.finditer(text))


def _cards(text: str) -> Iterator[Span]:
    from stdnum import luhn

    for found in _CARD.finditer(text):
        if luhn.is_valid(re.sub(r"[ -]", "", found[0])):
            yield (*found.span(), "CARD")


def _ibans(text: str) -> Iterator[Span]:
    """Words may follow one without anything between that is not in an IBAN too: the end is tried out."""
    from stdnum import iban

    for found in _IBAN.finditer(text):
        ends = [found.end(), *(found.start() + gap.start() for gap in re.finditer(r"[ -]", found[0]))]
        for end in sorted(ends, reverse=True):
            if iban.is_valid(text[found.start() : end]):
                yield found.start(), end, "IBAN"
                break


def _phones(text: str) -> Iterator[Span]:
    import phonenumbers

    for region in PHONE_REGIONS:
        for found in phonenumbers.PhoneNumberMatcher(text, region):
            yield found.start, found.end, "PHONE"


def _is_random(run: str) -> bool:
    """Whether words do not look so: digits among letters of both cases, or a long hexadecimal number."""
    digits = sum(character.isdigit() for character in run)
    if re.fullmatch(r"[0-9a-fA-F]{32,}", run):
        return digits > 0
    has_both_cases = any(map(str.islower, run)) and any(map(str.isupper, run))
    return digits >= 2 and has_both_cases


@cache
def _key_patterns() -> tuple[re.Pattern[str], ...]:
    """The forms of keys that detect-secrets knows. Its detectors are asked for nothing else: some verify what
    they find by sending it to the provider."""
    from detect_secrets import plugins
    from detect_secrets.plugins.base import RegexBasedDetector

    for module in pkgutil.iter_modules(plugins.__path__):
        importlib.import_module(f"{plugins.__name__}.{module.name}")
    detectors: list[Any] = [
        kind for kind in RegexBasedDetector.__subclasses__() if not kind.__abstractmethods__
    ]
    return tuple(pattern for kind in detectors for pattern in kind.denylist)


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    """The spans in order; those that overlap become one, of the kind of the first."""
    merged: list[Span] = []
    for start, end, kind in sorted(spans, key=lambda span: (span[0], -span[1])):
        if merged and start < merged[-1][1]:
            first, last, first_kind = merged[-1]
            merged[-1] = first, max(last, end), first_kind
        else:
            merged.append((start, end, kind))
    return iter(merged)
