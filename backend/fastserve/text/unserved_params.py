"""Sampling parameters that vLLM has and FastServe does not serve: accepted where they ask for nothing."""

from __future__ import annotations

import msgspec

from fastserve.errors import RequestError, invalid
from fastserve.text.validation import coerce

_HARMLESS: dict[str, tuple[bool | int | float | str, ...]] = {
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
"""Each with the values at which vLLM does not do it either."""
UNSERVED_NAMES = frozenset(_HARMLESS)


def check_unserved(name: str, value: object) -> None:
    """Raises RequestError unless `value` is None or asks for nothing; `name` is one of UNSERVED_NAMES."""
    harmless = _HARMLESS[name]
    if value is not None and not any(_is_same(value, default) for default in harmless):
        allowed = " or ".join(["not given", *map(_json, harmless)])
        raise invalid(name, value, f"{allowed} (FastServe does not do it)")


def _is_same(value: object, default: object) -> bool:
    """Whether `value` is `default`, perhaps as a string; True is not 1."""
    try:
        return coerce("", value, type(default)) == default
    except RequestError:
        return False


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
