"""What passes between the common queue and the engine: what it could take, and what runs again.

    engine -> EngineCapacity -> queue        queue -> Released, ResumeList -> engine

Numbers are absolute, so that a message that is lost or late does no harm. What happens once, and must not be
lost, goes in numbered batches that are told again until the other side says that it knows them (`Outbox`).
"""

from __future__ import annotations

from msgspec import Struct

from fastserve.types import Request, RequestView, Resume


class Released(Struct, frozen=True, tag=True):
    """From `scheduler` to `engine`: a request runs now, on that replica."""

    request: Request
    replica: int
    overtaken_by: int = 0
    """Requests that came later and were released earlier."""


class ReplicaCapacity(Struct, frozen=True):
    """What one worker could take."""

    incarnation: str
    """The worker's; numbers of different incarnations are not compared."""
    received: int
    """Releases to this replica, since the server started, that the numbers below account for."""
    arrived: int
    """Releases to it that have come at all: a long step leaves `received` behind."""
    free_slots: int = 0
    """Sequences that could still be added to the batch."""
    free_blocks: int = 0
    """KV blocks that could still be used."""
    free_tokens: int = 0
    """What is left of the next step's token budget."""
    num_running: int = 0
    num_blocks: int = 0
    """KV blocks in all."""
    running_ranks: list[tuple[float, ...]] = []
    """Of the running sequences that would be preempted first, in that order."""
    running_blocks: list[int] = []
    """KV blocks that each of them would leave at most: its own, those that it shares, and those that are kept
    for it."""


class Preempted(Struct, frozen=True, tag=True):
    """A sequence waits for a place again, or found none. Its tokens stay with the engine."""

    replica: int
    """Where it ran last."""
    view: RequestView
    can_move: bool = True
    """Whether another replica may go on with it: one of several sequences shares the others' prompt."""


class Ended(Struct, frozen=True, tag=True):
    """A preempted sequence has ended: nobody needs to resume it."""

    uid: str
    index: int


class TenantTokens(Struct, frozen=True, tag=True):
    """Tokens that were computed for a tenant."""

    tenant: str
    num_prompt_tokens: int
    num_output_tokens: int


class Finished(Struct, frozen=True, tag=True):
    """A request that was released has ended: what it holds of its tenant's quota is free again."""

    uid: str
    num_tokens: int
    """Of its prompt and its answers, as far as they were computed."""


Event = Preempted | Ended | TenantTokens | Finished


class EngineCapacity(Struct, frozen=True):
    """From `engine` to `scheduler`."""

    serial: int
    """Grows; an older message than the last one seen changes nothing."""
    time: float
    """When the engine sent it; 0: it has sent nothing yet."""
    replicas: list[ReplicaCapacity]
    events_number: int = 0
    events: list[Event] = []
    """A batch: see `Outbox`."""
    resumes_seen: int = 0
    """The number of the last `ResumeList` that has come."""
    block_size: int = 0
    """Tokens in a KV block; 0: not known yet."""
    max_model_len: int | None = None
    """Tokens of prompt and answer that the model and its KV cache can hold; None: not known yet."""


class ResumeList(Struct, frozen=True):
    """From `scheduler` to `engine`: which preempted sequences run again."""

    number: int
    resumes: list[Resume]
    """A batch: see `Outbox`."""
    num_waiting: int = 0
    """In the queue: while somebody waits, it wants to know of every change."""
