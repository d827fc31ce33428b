"""From the sampling parameters that a client sent to `SamplingParams`; the names and meanings are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from fastserve.errors import invalid
from fastserve.text.guide import GUIDE_NAMES
from fastserve.text.unserved_params import UNSERVED_NAMES, check_unserved
from fastserve.text.validation import Vocabulary, coerce, decode_text, unknown_name
from fastserve.types import SamplingParams

UNLIMITED = 2**31 - 1
"""`max_tokens` as null: whatever the context holds."""

_TYPES = {
    name: kind
    for name, kind in get_type_hints(SamplingParams, include_extras=True).items()
    if name != "guide"
}
SAMPLING_NAMES = frozenset(_TYPES) | frozenset(GUIDE_NAMES)

_GREEDY_BELOW = 1e-5  # vLLM's bound: logits divided by less overflow
_STRINGS = (
    Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=64)],
    "at most 64 texts, each of 1 to 256 characters",
)
_BOUNDED: dict[str, tuple[Any, str]] = {
    "stop": _STRINGS,
    "bad_words": _STRINGS,
    "stop_token_ids": (Annotated[list[int], Meta(max_length=1024)], "at most 1024 {ids}"),
    "logit_bias": (
        Annotated[dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=1024)],
        "an object of at most 1024 members, from token ids to numbers from -100 to 100",
    ),
}
"""Types narrower than those of `SamplingParams`, and the same in words."""


def parse_sampling_params(values: Mapping[str, Any], vocabulary: Vocabulary) -> SamplingParams:
    """The parameters in `values` but for a guide, each as itself or as a string; null is the default.

    As in vLLM, `max_tokens` as null becomes UNLIMITED, a seed of -1 none, and a temperature too small to
    divide by becomes 0. Raises RequestError, which names the parameter.
    """
    for name, value in values.items():
        if name in UNSERVED_NAMES:
            check_unserved(name, value)
        elif name not in SAMPLING_NAMES:
            raise unknown_name("sampling parameter", name, SAMPLING_NAMES)
    given = {name: value for name, value in values.items() if value is not None}
    fields = {name: _parse(name, value, vocabulary) for name, value in given.items() if name in _TYPES}
    if "max_tokens" in values and values["max_tokens"] is None:
        fields["max_tokens"] = UNLIMITED
    return _checked(SamplingParams(**fields), vocabulary)


def is_sampling_name(name: str) -> bool:
    """Whether vLLM has a sampling parameter of that name, served here or not."""
    return name in SAMPLING_NAMES or name in UNSERVED_NAMES


def _parse(name: str, value: object, vocabulary: Vocabulary) -> Any:
    if name == "stop" and isinstance(value, str | bytes):
        value = [value]
    kind, allowed = _BOUNDED.get(name, (_TYPES[name], None))
    result = coerce(name, value, kind, allowed and allowed.format(ids=vocabulary.allowed))
    if name in ("stop_token_ids", "logit_bias"):
        vocabulary.check(name, result)
    if name in ("stop", "bad_words"):
        for text in result:
            decode_text(name, text)
    return result


def _checked(params: SamplingParams, vocabulary: Vocabulary) -> SamplingParams:
    """Checks what concerns several parameters at once, and replaces the values that mean another."""
    temperature = 0.0 if params.temperature < _GREEDY_BELOW else params.temperature
    if params.n > 1 and temperature == 0.0:
        raise invalid("n", params.n, "1 where `temperature` is 0: all the answers would be the same")
    if params.min_tokens > params.max_tokens:
        raise invalid("min_tokens", params.min_tokens, f"at most `max_tokens`, which is {params.max_tokens}")
    return msgspec.structs.replace(
        params,
        temperature=temperature,
        top_k=min(params.top_k, vocabulary.size),
        seed=None if params.seed == -1 else params.seed,
    )
