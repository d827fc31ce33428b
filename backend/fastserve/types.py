"""The messages that travel through FastServe, in the order in which a request meets them.

    client -> Request -> (scheduler) SchedulerOutput -> (engine) Add -> (worker) StepOutput
           -> (engine) RequestOutput -> (postprocess) text

Every one is immutable, refuses unknown keys and crosses processes as MessagePack (`encode`, `decode`).
Times are `time.monotonic()` seconds: on Linux all processes of a machine share that clock.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

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

    @property
    def priority_label(self) -> int:
        """The priority in metrics, from -10 to 10: clients choose freely, but labels must stay few."""
        return max(-10, min(10, self.priority))


class Queued(Struct, frozen=True, tag=True):
    """From `scheduler`, before a forwarded request that it releases later: the request waits in the queue."""

    uid: str


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
    """The client's hint, or `max_tokens`: an upper bound, not a forecast."""
    waiting_since: float | None
    """Since when it has waited without a place in the batch; None while it has one."""
    num_tokens: int
    """Prompt and generated tokens."""
    num_served_tokens: int = 0
    """Tokens that were computed for it or that the prefix cache had, each counted once."""
    state: tuple[float, ...] = ()
    """The policy's own."""


def view_of(request: Request, index: int = 0) -> RequestView:
    """The view of a request that has just come."""
    num_prompt_tokens = len(request.prompt_token_ids)
    return RequestView(
        uid=request.uid,
        index=index,
        priority=request.priority,
        arrival=request.arrival,
        tenant=request.tenant,
        num_prompt_tokens=num_prompt_tokens,
        expected_output_tokens=request.sampling.max_tokens,
        waiting_since=request.arrival,
        num_tokens=num_prompt_tokens,
    )


class ReplicaCapacity(Struct, frozen=True):
    """What one worker could take."""

    incarnation: str
    """The worker's; numbers of different incarnations are not compared."""
    received: int
    """Releases to this replica, since the server started, that the numbers below account for."""
    arrived: int
    """Releases to it that have come at all: a long step leaves `received` behind."""
    free_slots: int
    """Sequences that could still be added to the batch."""
    free_blocks: int
    """KV blocks that could still be used."""
    free_tokens: int
    """What is left of the next step's token budget."""
    num_running: int
    num_blocks: int = 0
    """KV blocks in all."""
    running_ranks: list[tuple[float, ...]] = []
    """Of the running sequences that would be preempted first, in that order."""


class Preempted(Struct, frozen=True):
    """A sequence that waits for a place again. Its tokens stay with the engine."""

    number: int
    """Grows by one with each, so that one that is told twice is queued once."""
    replica: int
    """Where it ran last."""
    view: RequestView


class EngineCapacity(Struct, frozen=True):
    """From `engine` to `scheduler`: absolute numbers, so that a lost or late message does no harm."""

    serial: int
    """Grows; an older message than the last one seen is dropped."""
    time: float
    """When the engine sent it; 0: it has sent nothing yet."""
    replicas: list[ReplicaCapacity]
    preempted: list[Preempted] = []
    """Those that the scheduler has not acknowledged yet."""
    ended: list[tuple[str, int]] = []
    """Sequences (uid, index) that were preempted and have ended meanwhile, not acknowledged yet."""
    num_resumed: int = 0
    """`Resume` messages that have come, of all that were sent."""
    tenant_tokens: dict[str, tuple[int, int]] = {}
    """Prompt and output tokens computed for each tenant since the server started; where that has changed."""
    block_size: int = 0
    """Tokens in a KV block; 0: not known yet."""
    max_model_len: int | None = None
    """Tokens of prompt and answer that the model and its KV cache can hold; None: not known yet."""


class Resume(Struct, frozen=True):
    """From `scheduler` to `engine`: a preempted sequence may run again."""

    uid: str
    index: int
    replica: int


class ResumeList(Struct, frozen=True):
    """The answer to an `EngineCapacity`: what was resumed and is not known to have come."""

    first: int
    """The number of the first, of all that were ever sent."""
    resumes: list[Resume]


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


class Rejected(Struct, frozen=True, tag=True):
    """From `scheduler`: a forwarded request that fails in the queue.

    Its failure goes the way of an answer: between models, Triton server 2.51 loses an error that follows
    a response, and `Queued` was one.
    """

    request: Request
    outcome: Outcome
    failure: Failure


SchedulerOutput: Any = Request | Queued | Rejected
"""From `scheduler` to `engine`."""


class Add(Struct, frozen=True, tag=True):
    """To the worker: serve this."""

    request: Request


class Cancel(Struct, frozen=True, tag=True):
    """To the worker: stop this now. STOP: a stop string was met; CANCELLED: the client has cancelled."""

    uid: str
    outcome: Outcome
    index: int | None = None
    """Only that sequence of the request (one of `n`); None: all."""


class CancelById(Struct, frozen=True):
    """To `engine`: stop the client's requests of this id that had arrived by then. Later ones live."""

    request_id: str
    time: float
    """When the cancel came."""


class BlockUnload(Struct, frozen=True, tag=True):
    """To `engine`: leave this request unanswered until the server may be ready again (see `Readiness`)."""


class HealthReport(Struct, frozen=True, tag=True):
    """To `engine` from another model: whether a thread of it works."""

    source: str
    """The model."""
    problem: str | None
    """A sentence; None: it works again."""


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
    failure: Failure | None = None


class EngineStats(Struct, frozen=True):
    """The state of a worker after a step; totals count since it started."""

    received: int
    """Requests taken in since the worker started."""
    running: int
    waiting: int
    free_slots: int
    lowest_key: float | None
    kv_blocks_total: int
    kv_blocks_used: int
    step_tokens: int
    """Tokens that this step computed; 0: no step was taken."""
    preemptions_total: int
    prefix_cache_hit_tokens_total: int


class StepOutput(Struct, frozen=True, tag=True):
    """From the worker: the output of one step for all sequences."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Ready(Struct, frozen=True, tag=True):
    """From the worker, once: the model is loaded."""

    incarnation: str
    max_model_len: int
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


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """MessagePack bytes of any message of this module."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview, as_type: type[T]) -> T:
    """The message in `data`. Raises msgspec.DecodeError or msgspec.ValidationError."""
    return msgspec.msgpack.decode(data, type=as_type)
