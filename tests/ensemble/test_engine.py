"""The model `engine` over a fake server and a worker that the test plays."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.ensemble.control_messages import CancelById, HealthReport
from fastserve.scheduling.capacity import Ended, EngineCapacity, Finished, Preempted, Released, ResumeList
from fastserve.types import (
    Add,
    Cancel,
    EngineStats,
    Failure,
    Outcome,
    OutputOptions,
    Ready,
    Request,
    RequestOutput,
    Resume,
    SamplingParams,
    SequenceOutput,
    StepOutput,
)

GONE = "the thread `queue-deadlines` has ended"
STATS = EngineStats(0, 0, 0, 4, 100, 512, [], [], 100, 0, 0, 0, {}, 0, 0, 0, 0, 0)


class FakeWorker:
    """A worker that does what the test says; ready as soon as it starts, unless `is_broken`."""

    started: list[FakeWorker]
    is_broken = False

    def __init__(
        self, config: Any, files: Any, replica: int, on_message: Any, on_death: Any, on_health: Any
    ) -> None:
        self.on_message, self.on_death, self.on_health = on_message, on_death, on_health
        self.sent: list[Any] = []

    def start(self) -> None:
        self.started.append(self)
        if self.is_broken:
            self.on_death("ended (code 1)")
        else:
            self.on_message(Ready(str(len(self.started)), 2048, 16, STATS))

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def stop(self) -> None:
        return

    def cpu_seconds(self) -> float:
        return 0.0

    def step(self, *outputs: SequenceOutput, received: int = 0) -> None:
        stats = msgspec.structs.replace(STATS, received=received, running=1, kv_blocks_used=1, step_tokens=1)
        self.on_message(StepOutput(list(outputs), stats))


class FakeQueue:
    """`scheduler`: whatever waits runs again as soon as there is a slot."""

    def __init__(self) -> None:
        self.model: Any = None
        """`engine`, which it tells what runs again."""
        self._waiting: dict[str, Resume] = {}
        self._resumes = ResumeList(0, [])
        self._events_seen = 0

    def answer(self, request: Any) -> list[Any]:
        from fastserve.ensemble.messaging import message_of, message_tensor

        capacity = message_of(request, "capacity", EngineCapacity)
        assert capacity is not None
        if capacity.events_number > self._events_seen:
            self._events_seen = capacity.events_number
            for event in capacity.events:
                if isinstance(event, Preempted):
                    self._waiting[event.view.uid] = Resume(event.view.uid, event.view.index, event.replica)
                elif isinstance(event, Ended):
                    self._waiting.pop(event.uid, None)
        has_been_seen = capacity.resumes_seen == self._resumes.number
        if has_been_seen and self._waiting and capacity.replicas[0].free_slots:
            self._resumes = ResumeList(self._resumes.number + 1, list(self._waiting.values()))
            self._waiting = {}
            resumes = message_tensor("resumes", self._resumes)
            self.model.execute([type(request)(inputs=[resumes])])
        return []


class Engine:
    """The model, its worker, and requests for it."""

    def __init__(self, pb_utils: Any, model: Any) -> None:
        self.pb_utils, self.model = pb_utils, model

    @property
    def worker(self) -> FakeWorker:
        return FakeWorker.started[-1]

    def message(self, name: str, message: Any) -> Any:
        from fastserve.ensemble.messaging import message_tensor

        return self.pb_utils.InferenceRequest(inputs=[message_tensor(name, message)])

    def requests(self, *requests: Request) -> list[Any]:
        """Sends them in one batch; their senders."""
        batch = [self.message("released", Released(request, 0)) for request in requests]
        self.model.execute(batch)
        return [each.sender for each in batch]

    def wait_for_worker(self) -> None:
        """Until the worker has got something."""
        with self.pb_utils.server.changed:
            assert self.pb_utils.server.changed.wait_for(lambda: self.worker.sent, 20)

    def execute(self, name: str, message: Any) -> Any:
        request = self.message(name, message)
        self.model.execute([request])
        return request.sender


@pytest.fixture
def engine(pb_utils: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    from fastserve.ensemble import engine_relay as module
    from fastserve.ensemble import worker_supervisor

    FakeWorker.started = []
    monkeypatch.setattr(FakeWorker, "is_broken", False)
    monkeypatch.setattr(worker_supervisor, "Worker", FakeWorker)
    monkeypatch.setattr(worker_supervisor, "RESTART_SECONDS", 0.0)
    monkeypatch.setattr(module, "locate", lambda model: ModelFiles(Path("none"), Path("none")))
    monkeypatch.setenv("FASTSERVE_MODEL_CONTROL", "explicit")
    queue = FakeQueue()
    pb_utils.server.answer = queue.answer
    queue.model = model = module.EngineModel()
    model.initialize({})
    yield Engine(pb_utils, model)
    model.finalize()


def a_request(uid: str, request_id: str = "", arrival: float = 10.0, n: int = 1) -> Request:
    output = OutputOptions(stream=True)
    return Request(uid, request_id, "", [1], SamplingParams(n=n), output, 0, "", arrival, None)


def outputs(sender: Any) -> list[RequestOutput]:
    from fastserve.ensemble.messaging import read_message

    return [read_message("output", array[0], RequestOutput) for array in sender.outputs("output")]


def token_ids(sender: Any) -> list[int]:
    return [token_id for output in outputs(sender) for each in output.outputs for token_id in each.token_ids]


def failure(sender: Any) -> Any:
    return outputs(sender)[-1].outputs[-1].failure


def test_a_request_goes_to_the_worker_and_its_tokens_come_back(engine: Engine) -> None:
    (sender,) = engine.requests(a_request("a"))
    assert [type(each) for each in engine.worker.sent] == [Add]
    engine.worker.step(SequenceOutput("a", token_ids=[1]))
    engine.worker.step(SequenceOutput("a", token_ids=[2], outcome=Outcome.STOP))
    assert (token_ids(sender), sender.is_final) == ([1, 2], True)


def test_all_tokens_before_a_failure_arrive_since_it_travels_as_data_behind_them(engine: Engine) -> None:
    """As an error in a response it would overtake them in a streaming ensemble of Triton server 2.51."""
    (sender,) = engine.requests(a_request("a"))
    engine.worker.step(SequenceOutput("a", token_ids=[1]))
    engine.worker.step(SequenceOutput("a", token_ids=[2]))  # within the interval: it is still here
    engine.worker.on_death("ended (code -9)")
    assert (token_ids(sender), sender.is_final, sender.error) == ([1, 2], True, None)
    assert [len(output.outputs) for output in outputs(sender)] == [1, 1, 1]  # it has none for company
    assert failure(sender).code == "UNAVAILABLE"
    assert "the engine's worker ended (code -9)" in failure(sender).message


def test_tokens_that_wait_go_before_a_failure_that_the_worker_tells(engine: Engine) -> None:
    (sender,) = engine.requests(a_request("a"))
    engine.worker.step(SequenceOutput("a", token_ids=[1]))
    engine.worker.step(SequenceOutput("a", token_ids=[2]))
    late = Failure("CANCELLED", "the request's time was over before it was finished")
    engine.worker.step(SequenceOutput("a", outcome=Outcome.TIMEOUT, failure=late))
    assert [each.final for each in outputs(sender)] == [False, False, True]
    assert (token_ids(sender), failure(sender)) == ([1, 2], late)


def finished(engine: Engine, count: int) -> dict[str, int]:
    """The tokens of the requests whose end `scheduler` was told of, when there are so many."""
    from fastserve.ensemble.messaging import message_of

    told: dict[str, int] = {}

    def have_come(server: Any) -> bool:
        for request in server.requests:
            capacity = message_of(request, "capacity", EngineCapacity)
            events = capacity.events if capacity is not None else []
            told.update({each.uid: each.num_tokens for each in events if isinstance(each, Finished)})
        return len(told) >= count

    engine.pb_utils.server.wait(have_come)
    return told


def test_the_queue_is_told_of_every_end_and_of_the_tokens_that_were_computed(engine: Engine) -> None:
    engine.requests(a_request("ends"), a_request("two", n=2), a_request("unsent"), a_request("lost"))
    engine.worker.step(SequenceOutput("ends", token_ids=[1, 2]), SequenceOutput("two", 0, token_ids=[1]))
    engine.worker.step(SequenceOutput("ends", token_ids=[3], outcome=Outcome.STOP))
    engine.worker.step(SequenceOutput("two", 1, token_ids=[5, 6], outcome=Outcome.STOP))
    engine.worker.step(SequenceOutput("two", 0, token_ids=[2], outcome=Outcome.LENGTH))
    assert finished(engine, 2) == {"ends": 1 + 3, "two": 1 + 4}
    engine.worker.step(SequenceOutput("lost", token_ids=[1]))
    cancelled = engine.message("released", Released(a_request("cancelled"), 0))
    cancelled.cancelled = True
    engine.model.execute([cancelled])
    engine.worker.on_death("ended (code -9)")
    assert finished(engine, 5) == {"ends": 4, "two": 5, "cancelled": 0, "lost": 2, "unsent": 0}


# --- failures hurt their own request


def test_a_message_that_cannot_be_read_fails_alone(engine: Engine) -> None:
    from fastserve.ensemble.message_signature import sign
    from fastserve.ensemble.messaging import strings

    bad = engine.pb_utils.InferenceRequest(inputs=[strings("released", [sign("released", b"\xc1")])])
    empty = engine.pb_utils.InferenceRequest()
    good = engine.message("released", Released(a_request("a"), 0))
    engine.model.execute([bad, empty, good])
    engine.worker.step(SequenceOutput("a", token_ids=[1], outcome=Outcome.STOP))
    assert (bad.sender.is_final, empty.sender.is_final, good.sender.is_final) == (True, True, True)
    assert "engine:" in bad.sender.error.message()
    assert "`inputs`" in empty.sender.error.message()
    assert good.sender.error is None


def test_a_response_that_cannot_be_sent_fails_alone_and_its_request_is_stopped(engine: Engine) -> None:
    first, second = engine.requests(a_request("a"), a_request("b"))
    first.fail_next(1)
    engine.worker.step(SequenceOutput("a", token_ids=[1]), SequenceOutput("b", token_ids=[2]))
    assert (failure(first).code, first.is_final) == ("UNAVAILABLE", True)
    assert "no shared memory" in failure(first).message
    assert engine.worker.sent[-1] == Cancel("a", Outcome.CANCELLED)
    engine.worker.step(SequenceOutput("b", token_ids=[3], outcome=Outcome.STOP))
    assert (token_ids(second), second.is_final) == ([2, 3], True)


@pytest.mark.usefixtures("short_shared_memory")
def test_a_failure_that_cannot_travel_as_data_ends_the_request_all_the_same(engine: Engine) -> None:
    (sender,) = engine.requests(a_request("a"))
    sender.fail_next(3)
    engine.worker.step(SequenceOutput("a", token_ids=[1]))
    assert sender.is_final
    assert "the answer could not be sent" in sender.error.message()


@pytest.mark.usefixtures("short_shared_memory")
def test_while_shared_memory_is_short_the_end_travels_alone(engine: Engine) -> None:
    """A final response that fails leaves a sender that takes no more: its client would wait for ever."""
    (sender,) = engine.requests(a_request("a"))
    flags_sent: list[tuple[bool, int]] = []
    sender.fail = lambda response, flags: flags_sent.append((response is not None, flags))
    engine.worker.step(SequenceOutput("a", token_ids=[1], outcome=Outcome.STOP))
    assert flags_sent == [(True, 0), (False, 1)]


def test_metrics_that_fail_hurt_nobody(engine: Engine) -> None:
    engine.pb_utils.server.failing_metrics |= {"fastserve_step_batch_tokens", "fastserve_requests_running"}
    (sender,) = engine.requests(a_request("a"))
    engine.worker.step(SequenceOutput("a", token_ids=[1], outcome=Outcome.STOP))
    assert token_ids(sender) == [1]


def test_a_gauge_that_could_not_be_told_is_told_again_though_nothing_more_happens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is stopped waits for gauges of 0."""
    from fastserve.ensemble import capacity_publisher

    monkeypatch.setattr(capacity_publisher, "REPEAT_SECONDS", 0.02)
    server = engine.pb_utils.server
    engine.requests(a_request("a"))
    engine.worker.on_message(StepOutput([], msgspec.structs.replace(STATS, received=1, running=1)))
    engine.model._metrics._reported_at = 0.0
    engine.worker.on_message(StepOutput([], msgspec.structs.replace(STATS, received=1, running=1)))
    assert server.metric("fastserve_requests_running") == 1
    server.failing_metrics |= {"fastserve_requests_running"}
    last = SequenceOutput("a", token_ids=[1], outcome=Outcome.STOP)
    engine.worker.on_message(StepOutput([last], msgspec.structs.replace(STATS, received=1)))
    server.failing_metrics.clear()
    server.wait(lambda each: each.metric("fastserve_requests_running") == 0)


@pytest.mark.usefixtures("short_shared_memory")
@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_whatever_fails(engine: Engine, seed: int) -> None:
    """Responses, metrics and workers fail at random, but no error and no flag that travels alone."""
    rng = random.Random(seed)
    error = engine.pb_utils.TritonModelException("no shared memory")

    def fail(response: Any, flags: int) -> None:
        if response is not None and not response.has_error() and rng.random() < 0.2:
            raise error

    senders: dict[str, Any] = {}
    for number in range(200):
        uid = str(number)
        request = engine.message("released", Released(a_request(uid, f"id {number % 7}", float(number)), 0))
        request.sender.fail, request.cancelled = fail, rng.random() < 0.1
        senders[uid] = request.sender
        engine.model.execute([request])
        known = [each.request.uid for each in engine.worker.sent if isinstance(each, Add)]
        outcomes = {each: Outcome.STOP if rng.random() < 0.2 else None for each in known[-9:]}
        engine.worker.step(*(SequenceOutput(each, outcome=end) for each, end in outcomes.items()))
        if rng.random() < 0.1:
            engine.execute("cancel", CancelById(f"id {rng.randrange(7)}", float(number)))
        if rng.random() < 0.05:
            engine.worker.on_death("ended (code -9)")
        names = {"fastserve_step_batch_tokens", "fastserve_worker_restarts_total"}
        engine.pb_utils.server.failing_metrics = names if rng.random() < 0.2 else set()
    engine.worker.on_death("ended (code -9)")
    assert [uid for uid, sender in senders.items() if not sender.is_final] == []


# --- a worker that dies


def test_what_a_dead_worker_had_fails_and_what_came_since_is_served_by_the_next(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    senders: list[Any] = []

    class Slow(FakeWorker):
        def start(self) -> None:
            senders.extend(engine.requests(a_request("meanwhile")))
            FakeWorker.start(self)

    from fastserve.ensemble import worker_supervisor as module

    monkeypatch.setattr(module, "Worker", Slow)
    (before,) = engine.requests(a_request("before"))
    engine.worker.on_death("ended (code -9)")
    assert "ended (code -9)" in failure(before).message
    engine.wait_for_worker()
    engine.worker.step(SequenceOutput("meanwhile", token_ids=[5], outcome=Outcome.STOP))
    assert token_ids(senders[0]) == [5]
    assert engine.pb_utils.server.metric("fastserve_worker_restarts_total") == 1


def test_requests_that_wait_for_a_worker_fail_when_it_cannot_start(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = 0
    senders: list[Any] = []

    class Broken(FakeWorker):
        def start(self) -> None:
            nonlocal starts
            starts += 1
            if starts == 1:
                senders.extend(engine.requests(a_request("waits")))
                self.on_death("ended (code 1)")
            else:
                FakeWorker.start(self)

    from fastserve.ensemble import worker_supervisor as module

    monkeypatch.setattr(module, "Worker", Broken)
    engine.worker.on_death("ended (code -9)")
    assert "ended (code 1)" in failure(senders[0]).message
    assert starts == 2


def test_the_server_is_not_ready_while_there_is_no_worker(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = engine.pb_utils.server
    lost = threading.Event()

    class Slow(FakeWorker):
        def start(self) -> None:
            server.wait(lambda each: each.loads == [("unload", "readiness")])
            lost.set()
            FakeWorker.start(self)

    from fastserve.ensemble import worker_supervisor as module

    monkeypatch.setattr(module, "Worker", Slow)
    server.answer = answer_readiness(engine)
    engine.worker.on_death("ended (code -9)")
    assert lost.is_set()
    server.wait(lambda each: each.loads == [("unload", "readiness"), ("load", "readiness")])


def answer_readiness(engine: Engine) -> Any:
    """Answers as the ensemble `readiness` does: its request goes to `engine`, which leaves it unanswered."""

    queue = FakeQueue()
    queue.model = engine.model

    def answer(request: Any) -> list[Any]:
        if request.model_name() == "readiness":
            engine.model.execute([request])
            request.sender.wait()
            return []
        return queue.answer(request)

    return answer


def test_the_server_is_not_ready_while_a_thread_of_another_step_is_gone(engine: Engine) -> None:
    server = engine.pb_utils.server
    server.answer = answer_readiness(engine)
    assert engine.execute("health", HealthReport("scheduler", GONE)).is_final
    server.wait(lambda each: each.loads == [("unload", "readiness")])
    engine.execute("health", HealthReport("scheduler", None))
    server.wait(lambda each: each.loads == [("unload", "readiness"), ("load", "readiness")])


def test_a_request_of_readiness_that_does_not_come_is_sent_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import readiness as module

    monkeypatch.setattr(module, "ARRIVAL_SECONDS", 0.05)
    failures = [engine.pb_utils.TritonModelException("no shared memory"), ValueError("broken")]
    answer_it = answer_readiness(engine)

    def answer(request: Any) -> list[Any]:
        if request.model_name() == "readiness" and failures:
            raise failures.pop()
        answers: list[Any] = answer_it(request)
        return answers

    engine.pb_utils.server.answer = answer
    engine.execute("health", HealthReport("scheduler", GONE))
    engine.pb_utils.server.wait(lambda each: each.loads == [("unload", "readiness")])
    assert not failures


def test_a_first_worker_that_cannot_start_is_said_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastserve.ensemble import engine_relay as module

    monkeypatch.setattr(FakeWorker, "is_broken", True)
    model = module.EngineModel()
    with pytest.raises(engine.pb_utils.TritonModelException, match="before it was ready"):
        model.initialize({})
    model.finalize()


def test_a_real_worker_that_is_not_understood_is_replaced_and_its_requests_fail(
    pb_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import fake_engine

    from fastserve.engine.worker import Worker
    from fastserve.ensemble import engine_relay as module
    from fastserve.ensemble import worker_supervisor

    monkeypatch.setattr(worker_supervisor, "Worker", partial(Worker, load=fake_engine.load_small))
    monkeypatch.setattr(module, "locate", lambda model: ModelFiles(Path("none"), Path("none")))
    queue = FakeQueue()
    pb_utils.server.answer = queue.answer
    queue.model = model = module.EngineModel()
    model.initialize({})
    engine = Engine(pb_utils, model)
    try:
        bad, other = engine.requests(a_request("a", "garbage"), a_request("b"))
        for sender in (bad, other):
            sender.wait()
            assert "could not be understood" in failure(sender).message
        (good,) = engine.requests(a_request("c"))
        good.wait()
        assert token_ids(good) == [100_000]
    finally:
        model.finalize()


def test_what_was_released_once_is_not_served_again_by_whoever_has_kept_it(engine: Engine) -> None:
    request = a_request("a", "mine", 10.0)
    (first,) = engine.requests(request)
    engine.worker.step(SequenceOutput("a", token_ids=[1], outcome=Outcome.STOP))
    first.wait()
    (again,) = engine.requests(request)
    assert "`released`: got 'a'; allowed: a request that has not been served before" in again.error.message()
    assert [each.request.uid for each in engine.worker.sent] == ["a"]


# --- cancels by the client's id


def test_a_cancel_stops_requests_of_its_id_that_had_arrived(engine: Engine) -> None:
    engine.requests(a_request("a", "mine", 10.0), a_request("b", "mine", 12.0), a_request("c", "other", 10.0))
    assert engine.execute("cancel", CancelById("mine", 11.0)).is_final
    assert engine.worker.sent[3:] == [Cancel("a", Outcome.CANCELLED)]


def test_a_cancel_of_an_ended_id_lets_the_next_request_of_that_id_live(engine: Engine) -> None:
    engine.requests(a_request("first", "mine", 10.0))
    engine.worker.step(SequenceOutput("first", token_ids=[1], outcome=Outcome.STOP))
    engine.execute("cancel", CancelById("mine", 11.0))
    (late, after) = engine.requests(a_request("late", "mine", 10.5), a_request("after", "mine", 11.5))
    assert failure(late).code == "CANCELLED"
    assert not after.is_final
    assert [each.request.uid for each in engine.worker.sent] == ["first", "after"]


def test_a_cancel_is_forgotten_when_no_request_of_its_time_can_live(engine: Engine) -> None:
    engine.execute("cancel", CancelById("old", 1000.0))
    engine.execute("cancel", CancelById("newer", 1599.0))
    assert len(engine.model._cancelled) == 2
    engine.execute("cancel", CancelById("newest", 1600.0))
    assert len(engine.model._cancelled) == 2
    (sender,) = engine.requests(a_request("a", "old", 999.0))
    assert not sender.is_final


def test_a_cancel_without_a_worker_ends_those_that_wait_for_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    senders: list[Any] = []

    class Slow(FakeWorker):
        def start(self) -> None:
            senders.extend(engine.requests(a_request("a", "mine")))
            engine.execute("cancel", CancelById("mine", 11.0))
            FakeWorker.start(self)

    from fastserve.ensemble import worker_supervisor as module

    monkeypatch.setattr(module, "Worker", Slow)
    engine.worker.on_death("ended (code -9)")
    assert failure(senders[0]).code == "CANCELLED"
    assert engine.worker.sent == []
