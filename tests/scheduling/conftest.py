"""Requests, views and policies, as the tests of several files want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings

from fastserve.scheduling.policies.fair import Fair
from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.scheduling.policies.hrrn import HRRN
from fastserve.scheduling.policies.mlfq import MLFQ
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.scheduling.policies.srpt import SRPT
from fastserve.scheduling.policies.strict_priority import StrictPriority
from fastserve.scheduling.sequence import Sequence
from fastserve.types import OutputOptions, Request, RequestView, SamplingParams, view_of

STARVATION_SECONDS = 8.0

POLICIES: dict[str, Callable[[], Policy]] = {
    "priority_age": lambda: PriorityAge(alpha=10.0, beta=1.0),
    "fcfs": FCFS,
    "mlfq": lambda: MLFQ(quantum=4.0, num_levels=4, starvation_seconds=STARVATION_SECONDS),
    "hrrn": HRRN,
    "fair": lambda: Fair({"b": 3.0}, starvation_seconds=STARVATION_SECONDS),
    "srpt": SRPT,
    "strict_priority": StrictPriority,
}
"""What makes each, with quanta and times that small tests reach."""

QUICK = settings(max_examples=150, stateful_step_count=40, deadline=None)


def a_request(uid: str = "r", prompt: list[int] | None = None, **fields: Any) -> Request:
    """`fields`: of Request, or of SamplingParams."""
    sampling = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__struct_fields__}
    values: dict[str, Any] = {
        "request_id": "",
        "prompt": "",
        "output": OutputOptions(),
        "priority": 0,
        "tenant": "",
        "arrival": 0.0,
        "deadline": None,
    }
    return Request(
        uid=uid,
        prompt_token_ids=[1] if prompt is None else prompt,
        sampling=SamplingParams(**sampling),
        **(values | fields),
    )


def a_view(uid: str = "r", **fields: Any) -> RequestView:
    """One that has waited since its arrival, with a prompt of one token."""
    arrival = fields.get("arrival", 0.0)
    values: dict[str, Any] = {
        "index": 0,
        "priority": 0,
        "arrival": arrival,
        "tenant": "",
        "num_prompt_tokens": 1,
        "expected_output_tokens": 1,
        "waiting_since": arrival,
    }
    values |= fields
    return RequestView(uid=uid, num_tokens=values["num_prompt_tokens"], **values)


def sequences_of(request: Request) -> list[Sequence]:
    """All `n`, as an engine makes them."""
    return [
        Sequence(request, index, view_of(request, index), list(request.prompt_token_ids))
        for index in range(request.sampling.n)
    ]
