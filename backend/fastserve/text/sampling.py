"""From the sampling parameters that a client sent to `SamplingParams`; the names and meanings are vLLM's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import msgspec

from fastserve.errors import RequestError, invalid
from fastserve.text.coercion import coerce, decode_json, decode_text
from fastserve.text.guide_validator import GuideValidator
from fastserve.text.vocabulary import Vocabulary
from fastserve.types import Guide, SamplingParams

UNLIMITED = 2**31 - 1
"""`max_tokens` as null: whatever the context holds."""

_TYPES = {
    name: kind
    for name, kind in get_type_hints(SamplingParams, include_extras=True).items()
    if name != "guide"
}
_GUIDE_NAMES = ("structured_outputs", "guided_decoding")
SAMPLING_NAMES = frozenset(_TYPES) | frozenset(_GUIDE_NAMES)

# What vLLM knows and FastServe does not do, with the values at which vLLM does not do it either.
_NOT_SERVED: dict[str, tuple[bool | int | float | str, ...]] = {
    "allowed_token_ids": (),
    "best_of": (1,),
    "detokenize": (True,),
    "early_stopping": (False,),
    "extra_args": (),
    "flat_logprobs": (False,),
    "include_reasoning": (True,),
    "length_penalty": (1.0,),
    "logits_processors": (),
    "lora_name": ("",),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

_GREEDY_BELOW = 1e-5  # vLLM's bound: logits divided by less overflow
_MAX_STRINGS = 64
_MAX_STRING_LENGTH = 256
_MAX_IDS = 1024
_MAX_BIAS = 100.0
_GUIDE_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_GUIDE_NOT_SERVED = (
    "backend",
    "disable_additional_properties",
    "disable_any_whitespace",
    "disable_fallback",
    "structural_tag",
    "whitespace_pattern",
)


def parse_sampling(
    values: Mapping[str, Any], vocabulary: Vocabulary, guides: GuideValidator
) -> SamplingParams:
    """The parameters in `values`, each as itself or as a string; null is the default.

    As in vLLM, `max_tokens` as null becomes UNLIMITED, a seed of -1 none, and a temperature too small to
    divide by becomes 0. Raises RequestError, which names the parameter.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name in values:
        _check_name(name, given.get(name))
    fields = {name: _parse(name, value, vocabulary) for name, value in given.items() if name in _TYPES}
    if "max_tokens" in values and values["max_tokens"] is None:
        fields["max_tokens"] = UNLIMITED
    params = SamplingParams(**fields, guide=_parse_guide(given, vocabulary, guides))
    return _checked(params, vocabulary)


def is_sampling_name(name: str) -> bool:
    """Whether vLLM has a sampling parameter of that name, served here or not."""
    return name in SAMPLING_NAMES or name in _NOT_SERVED


def unknown_name(what: str, name: object, allowed: Iterable[str]) -> RequestError:
    """The error for a name that is none of those allowed; it offers the nearest."""
    shown = str(name)[:60].encode(errors="backslashreplace").decode()
    near = difflib.get_close_matches(shown, allowed, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return RequestError(f"`{shown}`: no such {what}; {hint}allowed: {', '.join(sorted(allowed))}")


def _check_name(name: str, value: object) -> None:
    """Raises RequestError unless `name` is served, or its value (or None) asks for nothing."""
    if name in SAMPLING_NAMES:
        return
    if name not in _NOT_SERVED:
        raise unknown_name("sampling parameter", name, SAMPLING_NAMES)
    harmless = _NOT_SERVED[name]
    if value is not None and not any(_is_same(value, default) for default in harmless):
        raise invalid(
            name, value, " or ".join(["not given", *map(_json, harmless)]) + " (FastServe does not do it)"
        )


def _is_same(value: object, default: object) -> bool:
    """Whether `value` is `default`, perhaps as a string; True is not 1."""
    try:
        return coerce("", value, type(default)) == default
    except RequestError:
        return False


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _parse(name: str, value: object, vocabulary: Vocabulary) -> Any:
    if name == "stop":
        return _strings(name, [value] if isinstance(value, str | bytes) else value)
    if name == "bad_words":
        return _strings(name, value)
    if name == "stop_token_ids":
        return _token_ids(name, value, vocabulary)
    if name == "logit_bias":
        return _logit_bias(value, vocabulary)
    return coerce(name, value, _TYPES[name])


def _strings(name: str, value: object) -> list[str]:
    allowed = f"at most {_MAX_STRINGS} texts, each of 1 to {_MAX_STRING_LENGTH} characters"
    strings = coerce(name, value, list[str], allowed)
    if len(strings) > _MAX_STRINGS:
        raise invalid(name, strings, allowed)
    for text in strings:
        decode_text(name, text)
        if not text or len(text) > _MAX_STRING_LENGTH:
            raise invalid(name, text, allowed)
    return strings


def _token_ids(name: str, value: object, vocabulary: Vocabulary) -> list[int]:
    allowed = f"at most {_MAX_IDS} {vocabulary.allowed}"
    ids = coerce(name, value, list[int], allowed)
    if len(ids) > _MAX_IDS:
        raise invalid(name, ids, allowed)
    vocabulary.check(name, ids)
    return ids


def _logit_bias(value: object, vocabulary: Vocabulary) -> dict[int, float]:
    allowed = (
        f"an object of at most {_MAX_IDS} members, from token ids to numbers"
        f" from {-_MAX_BIAS:g} to {_MAX_BIAS:g}"
    )
    bias = coerce("logit_bias", value, dict[int, float], allowed)
    if len(bias) > _MAX_IDS:
        raise invalid("logit_bias", f"{len(bias)} members", allowed)
    vocabulary.check("logit_bias", bias)
    for token_id, number in bias.items():
        if not -_MAX_BIAS <= number <= _MAX_BIAS:
            raise invalid("logit_bias", {token_id: number}, allowed)
    return bias


def _checked(params: SamplingParams, vocabulary: Vocabulary) -> SamplingParams:
    """What concerns several parameters at once, and the values that mean another."""
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


def _parse_guide(values: Mapping[str, Any], vocabulary: Vocabulary, guides: GuideValidator) -> Guide | None:
    names = [name for name in _GUIDE_NAMES if name in values]
    if not names:
        return None
    if vocabulary.mismatch:
        raise RequestError(f"`{names[0]}`: it cannot be followed, as {vocabulary.mismatch}; allowed: none")
    if len(names) > 1:
        raise RequestError(f"`{names[0]}`: got `{names[1]}` beside it; allowed: one of them")
    name = names[0]
    given = decode_json(name, values[name])
    if not isinstance(given, Mapping):
        raise invalid(name, given, f"an object with one of {', '.join(_GUIDE_KINDS)}")
    for key, value in given.items():
        if key in _GUIDE_NOT_SERVED and value not in (None, False, ""):
            raise invalid(f"{name}.{key}", value, "not given (FastServe does not do it)")
        if key not in _GUIDE_NOT_SERVED and key not in _GUIDE_KINDS:
            raise unknown_name(f"member of `{name}`", key, _GUIDE_KINDS)
    kinds = [kind for kind in _GUIDE_KINDS if given.get(kind) not in (None, False)]
    if len(kinds) != 1:
        raise invalid(name, kinds, f"exactly one of {', '.join(_GUIDE_KINDS)}")
    guide = _guide(f"{name}.{kinds[0]}", kinds[0], given[kinds[0]])
    guides.validate(guide, f"{name}.{kinds[0]}")
    return guide


def _guide(field: str, kind: str, value: Any) -> Guide:
    """The guide of one kind; its texts can be encoded, whether it compiles is not asked here."""
    if kind == "json_object":
        if coerce(field, value, bool) is not True:
            raise invalid(field, value, "true")
        return Guide(json='{"type": "object"}')
    if kind == "json":
        schema = decode_json(field, value)
        if not isinstance(schema, Mapping):
            raise invalid(field, schema, "a JSON schema: an object, or a string of one")
        return Guide(json=_schema_text(field, schema))
    if kind == "choice":
        choices = coerce(field, value, list[str])
        if not choices or not all(decode_text(field, choice) for choice in choices):
            raise invalid(field, choices, "a list of one or more texts, none of them empty")
        return Guide(choice=choices)
    text = decode_text(field, value)
    if not text:
        raise invalid(field, text, "text that is not empty")
    return Guide(regex=text) if kind == "regex" else Guide(grammar=text)


def _schema_text(field: str, schema: Mapping[str, Any]) -> str:
    try:
        return msgspec.json.encode(schema).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"`{field}`: got what is no JSON ({error}); allowed: a JSON schema") from error
