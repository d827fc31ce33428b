"""The sampling parameters and chat options as keyword arguments, for type checkers and editors."""

from __future__ import annotations

from typing import Any, TypedDict


class SamplingOptions(TypedDict, total=False):
    """What `Model.predict` and `ModelServer.submit` take.

    Defaults and bounds are those of `SamplingParams`; the last four are for chats only.
    """

    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: str | list[str]
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    logit_bias: dict[int, float]
    bad_words: list[str]
    skip_special_tokens: bool
    structured_outputs: dict[str, Any] | None
    guided_decoding: dict[str, Any] | None
    tools: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool
