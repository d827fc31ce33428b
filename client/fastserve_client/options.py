"""The keywords of `generate` and `stream`.

They are typed so that editors and type checkers know them. At run time nothing is refused here: the server
knows best what it serves, and names what it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class Message(TypedDict):
    """One message of a chat."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


class GuidedDecoding(TypedDict, total=False):
    """What the text must match: exactly one."""

    json: object
    """A JSON schema, as an object or as its text."""
    regex: str
    choice: list[str]
    grammar: str


class Sampling(TypedDict, total=False):
    """How to continue the prompt: the names, defaults and meaning of vLLM's `SamplingParams`."""

    n: int
    max_tokens: int
    """16 unless given."""
    min_tokens: int
    temperature: float
    """1 unless given; 0 is greedy."""
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | list[str]
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    logit_bias: dict[int, float]
    bad_words: list[str]
    skip_special_tokens: bool
    guided_decoding: GuidedDecoding
    structured_outputs: GuidedDecoding


class Options(Sampling, total=False):
    """All keywords of a call: those of sampling, and these.

    The prompt is one of `messages`, `prompt_token_ids` and the text that is a call's first argument.
    """

    messages: Sequence[Message] | None
    """A chat, to which the model's template is applied."""
    prompt_token_ids: Sequence[int] | None
    priority: int
    """Higher is more urgent; 0 unless given."""
    tenant: str | None
    """For fairness, quotas and metrics."""
    expected_output_tokens: int | None
    """A hint for the scheduler, at most `max_tokens`: how long the answer will be. It ends nothing."""
    timeout: float | None
    """Seconds from the call to its last response; the server abandons the request then too."""
    headers: Mapping[str, str] | None
    """Of this call, beside those of the client."""
    request_id: str | None
    """By which `cancel` finds the request; a new random one unless given."""
    return_token_ids: bool
    return_logprobs: bool
    """Unless given, whether `logprobs` is."""
    return_cumulative_logprob: bool
    return_timing: bool
    """Why the answer took as long as it did: `Generation.timing`."""
    exclude_input_in_output: bool
    """True unless given; False puts the prompt before the text (refused when streaming)."""
