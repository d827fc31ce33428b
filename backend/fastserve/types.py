"""The messages that travel through FastServe, in the order in which a request meets them.

    client -> Request -> (scheduler) Request -> (engine) Add -> (worker) StepOutput
           -> (engine) RequestOutput -> (postprocess) text

Every one is immutable, refuses unknown keys and crosses processes as MessagePack (`encode`, `decode`).
Times are `time.monotonic()` seconds: on Linux all processes of a machine share that clock.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from fastserve.errors import RequestError

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
TokenLogprob = tuple[int, float, int]
"""(token id, natural-log probability, rank from 1) under the model's own distribution."""


class Guide(Struct, frozen=True, forbid_unknown_fields=True):
    """Guided decoding: exactly one is given."""

    json: str | None = None
    """A JSON schema."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """A context-free grammar in llguidance's dialect of Lark."""


class SamplingParams(Struct, frozen=True, forbid_unknown_fields=True):
    """How to continue a prompt; the names and defaults of vLLM's class of that name."""

    n: Annotated[int, Meta(ge=1, le=64)] = 1
    max_tokens: Positive = 16
    min_tokens: NonNegative = 0
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    """0 and -1: all tokens."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] = 1.0
    """Logits are divided by it: by much less, and they are no longer finite."""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    seed: int | None = None
    """A signed 64-bit number."""
    stop: list[str] = []
    stop_token_ids: list[NonNegative] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to report beside the chosen one."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    logit_bias: dict[int, float] = {}
    bad_words: list[str] = []
    skip_special_tokens: bool = True
    guide: Guide | None = None
    """`guided_decoding` or `structured_outputs` in a request."""


class OutputOptions(Struct, frozen=True):
    """Parts of the answer that the client wants besides the text."""

    stream: bool = False
    echo: bool = False
    """The prompt before the text (`exclude_input_in_output = false`)."""
    finish_reason: bool = False
    cumulative_logprob: bool = False
    logprobs: bool = False
    """Null per sequence where the sampling parameters have no `logprobs`, as the vLLM backend answers."""
    null_logprobs: bool = False
    """The sampling parameters had none: those that the engine gives are for `cumulative_logprob` only."""
    token_ids: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    timing: bool = False
    """Why it took as long as it did: `ensemble.request_accounts.Timing`, with the last response."""


class Request(Struct, frozen=True, tag=True):
    """A validated, tokenized request. `preprocess` makes it; nothing after changes it."""

    uid: str
    """Ours, unique: a client may use one `request_id` twice."""
    request_id: str
    """The client's, by which it can be cancelled; may be empty."""
    prompt: str
    """The beginning of an echo's text."""
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output: OutputOptions
    priority: int
    tenant: str
    arrival: float
    deadline: float | None
    """When it is abandoned, running or not."""
    bad_words_token_ids: list[list[int]] = []
    """`sampling.bad_words`, tokenized in each way in which they can be met."""
    expected_output_tokens: int | None = None
    """The client's hint of how long an answer will be, from 1 to what it asked for as `max_tokens`."""
    cache_salt: str = ""
    """Part of its blocks' hashes: only requests with the same find them in the prefix cache."""
    key_id: str = ""
    """Of the key that its client has shown."""

    @property
    def max_total_tokens(self) -> int:
        """The prompt's, and the most that its `n` answers may have."""
        return len(self.prompt_token_ids) + self.sampling.n * self.sampling.max_tokens


class Preemptions(Struct, frozen=True, array_like=True):
    """What preemptions have cost a sequence so far."""

    count: int = 0
    num_recomputed_tokens: int = 0
    num_swapped_tokens: int = 0
    """Whose keys and values came back from host memory."""


class RequestView(Struct, array_like=True):
    """What a policy sees of one sequence of a request, small enough to be sent about.

    Whoever holds the sequence keeps `waiting_since` and the numbers of tokens; a policy writes `state` alone.
    """

    uid: str
    index: int
    """Which of the request's `n` sequences."""
    priority: int
    arrival: float
    tenant: str
    num_prompt_tokens: int
    expected_output_tokens: int
    """The client's hint, or else `max_tokens`."""
    waiting_since: float | None
    """Since when it has waited without a place in the batch; None while it has one."""
    num_tokens: int
    """Prompt and generated tokens."""
    num_served_tokens: int = 0
    """Tokens that were computed for it or that the prefix cache had, each counted once."""
    state: tuple[float, ...] = ()
    """The policy's own."""
    has_length_hint: bool = False
    """Whether `expected_output_tokens` is the client's forecast, and not only the most that it may be."""
    preemptions: Preemptions = Preemptions()


def view_of(request: Request, index: int = 0) -> RequestView:
    """The view of a request that has just come."""
    num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    return RequestView(
        uid=request.uid,
        index=index,
        priority=request.priority,
        arrival=request.arrival,
        tenant=request.tenant,
        num_prompt_tokens=num_prompt_tokens,
        expected_output_tokens=min(request.expected_output_tokens or max_tokens, max_tokens),
        waiting_since=request.arrival,
        num_tokens=num_prompt_tokens,
        has_length_hint=request.expected_output_tokens is not None,
    )


class Outcome(str, Enum):
    """How a request ended (the `outcome` label of `fastserve_requests_total`)."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    ERROR = "error"


class Failure(Struct, frozen=True):
    """Why a request ended without an answer."""

    code: str
    """An `ErrorCode`."""
    message: str

    @classmethod
    def of(cls, error: RequestError) -> Failure:
        """What an error says."""
        return cls(error.code.value, str(error))


class Add(Struct, frozen=True, tag=True):
    """To the worker: serve this."""

    request: Request
    generated: list[int] = []
    """Tokens that it has already: it was preempted on another worker, and has one sequence."""
    view: RequestView | None = None
    """As it was there; None: the request is new."""


class Forget(Struct, frozen=True, tag=True):
    """To the worker: another one goes on with this request. Nothing more is to come of it here."""

    uid: str


class Cancel(Struct, frozen=True, tag=True):
    """To the worker: stop this now. STOP: a stop string was met; CANCELLED: the client has cancelled."""

    uid: str
    outcome: Outcome
    index: int | None = None
    """Only that sequence of the request (one of `n`); None: all."""


class Resume(Struct, frozen=True, tag=True):
    """From the common queue: a preempted sequence may run again."""

    uid: str
    index: int
    replica: int = 0


class Shutdown(Struct, frozen=True, tag=True):
    """To the worker: leave."""


class SequenceOutput(Struct, frozen=True):
    """The output of one step for one sequence of a request."""

    uid: str
    index: int = 0
    """Which of the request's `n` sequences."""
    token_ids: list[int] = []
    logprobs: list[list[TokenLogprob]] = []
    """Per new token: the chosen one first, then the likeliest; empty unless asked for."""
    prompt_logprobs: list[list[TokenLogprob]] | None = None
    """Once, with the first token, if asked for; the first position has none."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache; only with the first token."""
    outcome: Outcome | None = None
    """Set on the last output of this sequence."""
    preemptions: Preemptions | None = None
    """With the last output of a sequence that was preempted."""
    failure: Failure | None = None


class EngineStats(Struct, frozen=True):
    """The state of a worker after a step; totals count since it started."""

    received: int
    """Requests and resumed sequences taken in since the worker started."""
    running: int
    waiting: int
    """Sequences that were preempted and wait in the common queue, or for the prompt that they share."""
    free_slots: int
    free_blocks: int
    free_tokens: int
    running_ranks: list[tuple[float, ...]]
    """See `ReplicaCapacity`, as of `running_blocks`."""
    running_blocks: list[int]
    kv_blocks_total: int
    kv_blocks_used: int
    step_tokens: int
    """Tokens that this step computed; 0: no step was taken."""
    preemptions_total: int
    resumptions_total: dict[str, int]
    """Preempted sequences that went on, by `PreemptionKind`."""
    swapped_blocks_total: int
    """KV blocks that came back from host memory."""
    recomputed_tokens_total: int
    prefix_cache_hit_tokens_total: int
    draft_tokens_total: int
    """Tokens that were proposed by speculation, and computed."""
    accepted_tokens_total: int
    """Those of them that became tokens of an answer."""


class StepOutput(Struct, frozen=True, tag=True):
    """From the worker: the output of one step for all sequences."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    preempted: list[RequestView] = []
    """Sequences that wait for a `Resume` since this step."""
    ended: list[tuple[str, int]] = []
    """Sequences (uid, index) that were preempted, and have ended since the last step."""


class Ready(Struct, frozen=True, tag=True):
    """From the worker, once: the model is loaded."""

    incarnation: str
    max_model_len: int
    block_size: int
    stats: EngineStats


class RequestOutput(Struct, frozen=True):
    """From `engine` to `postprocess`: the output for one request since the last message.

    Outputs of several steps are joined here when the client or the wire is slower than the engine.
    """

    uid: str
    outputs: list[SequenceOutput]
    request: Request | None = None
    """With the first one only."""
    final: bool = False
    released: float = 0.0
    """With the first one: when the request left the queue."""
    overtaken_by: int = 0
    """With the first one: see `Released`."""


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """MessagePack bytes of any message of this module."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview, as_type: type[T]) -> T:
    """The message in `data`. Raises msgspec.DecodeError or msgspec.ValidationError."""
    return msgspec.msgpack.decode(data, type=as_type)
