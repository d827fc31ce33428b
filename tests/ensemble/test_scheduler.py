"""The model `scheduler` over a fake server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from fastserve.config import Config, TenantQuota
from fastserve.ensemble.control_messages import HealthReport
from fastserve.scheduling.capacity import (
    EngineCapacity,
    Event,
    Finished,
    Preempted,
    Released,
    ReplicaCapacity,
    ResumeList,
)
from fastserve.types import OutputOptions, Request, Resume, SamplingParams, view_of
from fastserve_client.errors import server_error


class Scheduler:
    """The model, and requests for it."""

    def __init__(self, pb_utils: Any, model: Any) -> None:
        self.pb_utils, self.model = pb_utils, model
        self._serial = 0

    def message(self, name: str, message: Any) -> Any:
        from fastserve.ensemble.messaging import message_tensor

        return self.pb_utils.InferenceRequest(inputs=[message_tensor(name, message)])

    def requests(self, *requests: Request) -> list[Any]:
        """Sends them in one batch; their senders."""
        batch = [self.message("request", request) for request in requests]
        self.model.execute(batch)
        return [each.sender for each in batch]

    def capacity(self, free_slots: int, received: int = 0, max_model_len: int | None = None) -> Any:
        self._serial += 1
        request = self.message("capacity", a_capacity(self._serial, free_slots, received, max_model_len))
        self.model.execute([request])
        return request.sender

    def tell(self, *events: Event) -> None:
        """What the engine says besides: it has room."""
        self._serial += 1
        capacity = a_capacity(self._serial, 1, received=1)
        capacity = msgspec.structs.replace(capacity, events_number=self._serial, events=list(events))
        self.model.execute([self.message("capacity", capacity)])

    def waiting(self, priority: int) -> float:
        value: float = self.pb_utils.server.metric("fastserve_requests_waiting", priority=str(priority))
        return value


@pytest.fixture
def make_scheduler(pb_utils: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scheduler]]:
    """A model with settings of its own."""
    from fastserve.ensemble import scheduler as module

    steps = []

    def make(**settings: Any) -> Scheduler:
        monkeypatch.setattr(module, "start_model", lambda: Config(**settings))
        model = module.SchedulerModel()
        model.initialize({})
        steps.append(model)
        return Scheduler(pb_utils, model)

    yield make
    for model in steps:
        model.finalize()


@pytest.fixture
def scheduler(make_scheduler: Callable[..., Scheduler]) -> Scheduler:
    return make_scheduler()


def a_request(uid: str, priority: int = 0, num_tokens: int = 1, deadline: float | None = None) -> Request:
    return Request(
        uid,
        "",
        "",
        [1] * num_tokens,
        SamplingParams(),
        OutputOptions(),
        priority,
        "",
        time.monotonic(),
        deadline,
    )


def a_capacity(
    serial: int, free_slots: int, received: int = 0, max_model_len: int | None = None
) -> EngineCapacity:
    replica = ReplicaCapacity("a", received, received, free_slots, 10_000, 10_000, 0)
    return EngineCapacity(serial, time.monotonic(), [replica], max_model_len=max_model_len)


def released(sender: Any) -> list[str]:
    from fastserve.ensemble.messaging import read_message

    return [read_message("released", array[0], Released).request.uid for array in sender.outputs("released")]


def fail_once(error: Exception) -> Any:
    failures = [error]

    def fail(response: Any, flags: int) -> None:
        if failures:
            raise failures.pop()

    return fail


def test_one_goes_at_first_and_the_rest_when_there_is_room(scheduler: Scheduler) -> None:
    first, second = scheduler.requests(a_request("a"), a_request("b"))
    assert (released(first), first.is_final, second.is_final) == (["a"], True, False)
    assert scheduler.capacity(1, received=1).is_final
    assert released(second) == ["b"]


def test_a_message_that_cannot_be_read_fails_alone(scheduler: Scheduler) -> None:
    from fastserve.ensemble.message_signature import sign
    from fastserve.ensemble.messaging import strings

    bad = scheduler.pb_utils.InferenceRequest(inputs=[strings("request", [sign("request", b"\xc1")])])
    good = scheduler.message("request", a_request("a"))
    scheduler.model.execute([bad, good])
    assert "scheduler:" in bad.sender.error.message()
    assert (bad.sender.is_final, released(good.sender)) == (True, ["a"])


@pytest.mark.usefixtures("short_shared_memory")
def test_a_request_that_cannot_be_sent_on_fails_alone(scheduler: Scheduler) -> None:
    batch = [scheduler.message("request", a_request(uid, priority)) for uid, priority in (("a", 1), ("b", 0))]
    batch[0].sender.fail = fail_once(scheduler.pb_utils.TritonModelException("no shared memory"))
    scheduler.capacity(2)
    scheduler.model.execute(batch)
    assert "could not be sent to the engine: no shared memory" in batch[0].sender.error.message()
    assert batch[0].sender.error.code() == scheduler.pb_utils.TritonError.UNAVAILABLE
    assert (batch[0].sender.is_final, released(batch[1].sender)) == (True, ["b"])


def test_an_answer_to_a_room_message_that_fails_leaves_the_requests_alone(scheduler: Scheduler) -> None:
    _, second = scheduler.requests(a_request("a"), a_request("b"))
    capacity = scheduler.message("capacity", a_capacity(1, 1, received=1))
    capacity.sender.fail = fail_once(scheduler.pb_utils.TritonModelException("no shared memory"))
    scheduler.model.execute([capacity])
    assert released(second) == ["b"]


def test_metrics_that_fail_hurt_nobody(scheduler: Scheduler) -> None:
    server = scheduler.pb_utils.server
    names = ("queue_wait_seconds", "requests_waiting", "requests_total")
    server.failing_metrics |= {f"fastserve_{name}" for name in names}
    scheduler.capacity(1, max_model_len=8)
    good, bad = scheduler.requests(a_request("a"), a_request("long", num_tokens=8))
    assert (released(good), bad.is_final) == (["a"], True)
    server.failing_metrics.clear()
    scheduler.requests(a_request("longer", num_tokens=9))
    assert server.metric("fastserve_requests_total", outcome="rejected") == 2


def test_a_gauge_that_could_not_be_told_is_told_again_though_nothing_more_happens(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is stopped waits for gauges of 0."""
    from fastserve.ensemble import metrics

    monkeypatch.setattr(metrics, "RETRY_SECONDS", 0.01)
    server = scheduler.pb_utils.server
    scheduler.capacity(0)
    scheduler.requests(a_request("a"))
    server.wait(lambda each: scheduler.waiting(0) == 1)
    server.failing_metrics |= {"fastserve_requests_waiting"}
    scheduler.capacity(1)
    server.failing_metrics.clear()
    server.wait(lambda each: scheduler.waiting(0) == 0)


def test_the_clock_goes_on_after_a_failure(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was: the next deadline is kept."""
    expire = scheduler.model._admission.expire
    failures = [ValueError("broken")]

    def fail_first(now: float) -> Any:
        if failures:
            raise failures.pop()
        return expire(now)

    scheduler.requests(a_request("a"))
    monkeypatch.setattr(scheduler.model._admission, "expire", fail_first)
    (late,) = scheduler.requests(a_request("late", deadline=time.monotonic()))
    late.wait()
    assert "the request's limit in the queue" in late.error.message()
    assert not failures


def test_a_clock_that_cannot_go_on_makes_the_server_unready(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = scheduler.pb_utils.server
    expire = scheduler.model._admission.expire

    def fail(now: float) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(scheduler.model._admission, "expire", fail)
    scheduler.requests(a_request("a"))
    problem = HealthReport("scheduler", "the thread `queue-deadlines` keeps failing: ValueError: broken")
    server.wait(lambda each: health_reports(each) == [problem])
    monkeypatch.setattr(scheduler.model._admission, "expire", expire)
    server.wait(lambda each: health_reports(each) == [problem, HealthReport("scheduler", None)])


def health_reports(server: Any) -> list[Any]:
    from fastserve.ensemble.messaging import message_of

    assert {request.model_name() for request in server.requests} <= {"engine"}
    reports = [message_of(request, "health", HealthReport) for request in server.requests]
    return [report for report in reports if report is not None]


def test_a_prompt_that_the_cache_cannot_hold_is_refused_at_once_queued_or_not(scheduler: Scheduler) -> None:
    _, queued, short = scheduler.requests(a_request("a"), a_request("b", num_tokens=8), a_request("c"))
    scheduler.capacity(0, received=1, max_model_len=8)
    (late,) = scheduler.requests(a_request("d", num_tokens=20))
    assert (
        queued.error.message()
        == "INVALID_ARG: prompt: got 8 tokens; allowed: at most 7 (model length and KV cache)"
    )
    assert (
        late.error.message()
        == "INVALID_ARG: prompt: got 20 tokens; allowed: at most 7 (model length and KV cache)"
    )
    assert {queued.error.code(), late.error.code()} == {scheduler.pb_utils.TritonError.INVALID_ARG}
    assert (queued.is_final, late.is_final, short.is_final) == (True, True, False)


def test_a_full_queue_refuses_at_once(make_scheduler: Callable[..., Scheduler]) -> None:
    scheduler = make_scheduler(max_queue_size=1)
    scheduler.requests(a_request("goes"))
    (waits,) = scheduler.requests(a_request("waits"))
    (refused,) = scheduler.requests(a_request("refused"))
    assert (waits.is_final, refused.is_final) == (False, True)
    assert refused.error.code() == scheduler.pb_utils.TritonError.UNAVAILABLE


def test_a_tenant_over_its_quota_is_told_how_long_to_wait_and_others_are_served(
    make_scheduler: Callable[..., Scheduler],
) -> None:
    scheduler = make_scheduler(tenant_quotas={"a": TenantQuota(requests_per_second=0.001)})
    first, refused, other = scheduler.requests(
        *(msgspec.structs.replace(a_request(uid), tenant=uid[0]) for uid in ("a1", "a2", "b"))
    )
    assert refused.error.code() == scheduler.pb_utils.TritonError.UNAVAILABLE
    assert refused.error.message().startswith(
        "UNAVAILABLE: tenant 'a' is over its quota of 0.001 requests per"
    )
    assert server_error(refused.error.message()).retry_after == pytest.approx(1000, abs=1)
    assert (released(first), refused.is_final, other.is_final) == (["a1"], True, False)
    metric = scheduler.pb_utils.server.metric
    assert metric("fastserve_quota_rejections_total", tenant="a", quota="requests_per_second") == 1
    assert metric("fastserve_requests_total", outcome="rejected") == 1
    assert metric("fastserve_tenant_requests_waiting", tenant="b") == 1


def test_the_engine_tells_what_is_no_longer_in_flight(make_scheduler: Callable[..., Scheduler]) -> None:
    scheduler = make_scheduler(tenant_quotas={"": TenantQuota(tokens_in_flight=17)})
    first, refused = scheduler.requests(a_request("a"), a_request("b"))
    assert (released(first), "17 tokens in flight: 17 are" in refused.error.message()) == (["a"], True)
    scheduler.tell(Finished("a", 3))
    (again,) = scheduler.requests(a_request("b"))
    assert released(again) == ["b"]


@pytest.mark.usefixtures("short_shared_memory")
def test_a_request_that_cannot_be_sent_on_is_no_longer_in_flight(
    make_scheduler: Callable[..., Scheduler],
) -> None:
    scheduler = make_scheduler(tenant_quotas={"": TenantQuota(tokens_in_flight=17)})
    lost = scheduler.message("request", a_request("a"))
    lost.sender.fail = fail_once(scheduler.pb_utils.TritonModelException("no shared memory"))
    scheduler.model.execute([lost])
    assert "could not be sent to the engine" in lost.sender.error.message()
    (again,) = scheduler.requests(a_request("b"))
    assert again.error is None


def test_waits_are_told_by_priority_and_by_tenant(scheduler: Scheduler) -> None:
    scheduler.requests(msgspec.structs.replace(a_request("a", priority=3), tenant="blue"))
    server = scheduler.pb_utils.server
    for name, labels in (("", {"priority": "3"}), ("tenant_", {"tenant": "blue"})):
        (metric,) = server.metrics[f"fastserve_{name}queue_wait_seconds"]
        assert (metric.labels, len(metric.observed)) == ({"model": "fastserve", **labels}, 1)


def test_gauges_are_told_now_and_then_and_only_what_changed(make_scheduler: Callable[..., Scheduler]) -> None:
    scheduler = make_scheduler(priority_range=(-100, 100))
    server = scheduler.pb_utils.server
    for priority in range(-100, 101):
        scheduler.requests(a_request(str(priority), priority))
    calls = server.metric_calls("fastserve_requests_waiting")
    assert calls <= 21 * 20  # 201 requests within some tenths of a second; it was the square of that
    assert len(server.metrics["fastserve_requests_waiting"]) <= 21
    server.wait(lambda each: scheduler.waiting(-100) + scheduler.waiting(-90) == 10 + 10 - 1)
    calls = server.metric_calls("fastserve_requests_waiting")
    scheduler.capacity(0, received=1)
    scheduler.capacity(0, received=1)
    assert server.metric_calls("fastserve_requests_waiting") == calls
    scheduler.capacity(1000, received=1)
    assert [scheduler.waiting(priority) for priority in (-100, 0, 100)] == [0, 0, 0]


def test_the_engine_is_told_who_runs_again_until_it_has_heard(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import resume_sender

    server = scheduler.pb_utils.server
    failures = [scheduler.pb_utils.TritonModelException("loading")]

    def answer(request: Any) -> list[Any]:
        if failures:
            raise failures.pop()
        return []

    server.answer = answer
    monkeypatch.setattr(resume_sender, "RETRY_SECONDS", 0.01)
    scheduler.capacity(0)
    scheduler.tell(Preempted(0, view_of(a_request("a"))))
    server.wait(lambda each: resume_lists(each)[-2:] == [ResumeList(1, [Resume("a", 0)])] * 2)
    scheduler.requests(a_request("waits"))
    server.wait(lambda each: resume_lists(each)[-1].num_waiting == 1)


def resume_lists(server: Any) -> list[Any]:
    from fastserve.ensemble.messaging import message_of

    lists = [message_of(request, "resumes", ResumeList) for request in server.requests]
    return [each for each in lists if each is not None]
