"""The queue and the engine's replicas together: both models, and engines of a fake model in threads.

Messages between the models get lost, answers too, workers die, clients cancel.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.worker import run_engine
from fastserve.engine.worker_pipe import FromWorker, ToWorker
from fastserve.ensemble.control_messages import CancelById
from fastserve.types import (
    Add,
    Cancel,
    Failure,
    Outcome,
    OutputOptions,
    Ready,
    Request,
    RequestOutput,
    SamplingParams,
    Shutdown,
    decode,
    encode,
)

WAIT_SECONDS = 60.0
VOCAB = 60
SETTINGS: dict[str, Any] = {
    "num_blocks": 24,
    "block_size": 4,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 16,
}


class KilledError(Exception):
    """The worker is killed."""


class ThreadWorker:
    """A worker whose process is a thread: its engine is one of a fake model."""

    step_seconds = 0.0
    """Of each step, for a test that wants to come in between."""
    live: dict[int, ThreadWorker]
    """By replica."""
    make_engine: Callable[..., Any]

    def __init__(
        self, config: Any, files: Any, replica: int, on_message: Any, on_death: Any, on_health: Any
    ) -> None:
        self.on_message, self.on_death, self.replica = on_message, on_death, replica
        self._inbox: queue.SimpleQueue[ToWorker | Exception] = queue.SimpleQueue()
        self._is_killed = False
        self.engine = type(self).make_engine()
        self.num_added: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._lifecycle = threading.Lock()
        self._is_stopped = False

    def start(self) -> None:
        with self._lifecycle:
            if not self._is_stopped:
                self.live[self.replica] = self
                self._thread.start()

    def send(self, message: ToWorker) -> None:
        if isinstance(message, Add):
            self.num_added[message.request.uid] += 1
        self._inbox.put(decode(encode(message), ToWorker))  # type: ignore[arg-type]

    def kill(self) -> None:
        self._is_killed = True
        self._inbox.put(KilledError())

    def _run(self) -> None:
        try:
            self._tell(Ready(str(id(self)), self.engine.max_model_len, 4, self.engine.stats()))
            run_engine(self.engine, self._inbox, self._tell)
        except KilledError:
            self.on_death("ended (code -9)")

    def _tell(self, message: Any) -> None:
        if self._is_killed:
            raise KilledError
        time.sleep(self.step_seconds)
        self.on_message(decode(encode(message), FromWorker))  # type: ignore[arg-type]

    def stop(self) -> None:
        with self._lifecycle:
            self._is_stopped = True
        self._inbox.put(Shutdown())
        if self._thread.ident is not None:
            self._thread.join(WAIT_SECONDS)

    def cpu_seconds(self) -> float:
        return 0.0


class System:
    """Both models; what one sends reaches the other from a thread, as the server does it."""

    def __init__(self, pb_utils: Any, scheduler: Any, engine: Any) -> None:
        self.pb_utils, self.scheduler, self.engine = pb_utils, scheduler, engine
        self.random = random.Random(0)
        self.loss = 0.0
        """The share of the messages about capacity, and of their answers, that are lost."""
        self.senders: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._released: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._relay, daemon=True).start()
        pb_utils.server.answer = self._answer

    def _message(self, name: str, message: Any) -> Any:
        from fastserve.ensemble.messaging import message_tensor

        return self.pb_utils.InferenceRequest(inputs=[message_tensor(name, message)])

    def submit(self, request: Request) -> None:
        message = self._message("request", request)
        sent = message.sender.send

        def send(response: Any = None, flags: int = 0) -> None:
            sent(response, flags)
            if response is not None:
                self._released.put((request.uid, response))

        message.sender.send = send
        self.scheduler.execute([message])

    def _relay(self) -> None:
        """Hands what `scheduler` releases to `engine`, as the ensemble does."""
        while (item := self._released.get()) is not None:
            uid, response = item
            forwarded = self.pb_utils.InferenceRequest(inputs=response.output_tensors())
            self.senders[uid] = forwarded.sender
            self.engine.execute([forwarded])
            with self._changed:
                self._changed.notify_all()

    def _answer(self, request: Any) -> list[Any]:
        if request.model_name() == "readiness":
            self.engine.execute([request])
            request.sender.wait()
            return []
        if self.random.random() < self.loss:
            raise self.pb_utils.TritonModelException("no shared memory")
        model = self.engine if request.model_name() == "engine" else self.scheduler
        model.execute([request])
        if self.random.random() < self.loss:
            raise self.pb_utils.TritonModelException("no shared memory")
        responses: list[Any] = request.sender.responses
        return responses

    def cancel(self, request_id: str) -> None:
        self.engine.execute([self._message("cancel", CancelById(request_id, time.monotonic()))])

    def stop_sequence(self, uid: str, outcome: Outcome) -> None:
        self.engine.execute([self._message("stop", Cancel(uid, outcome))])

    def outputs(self, uid: str) -> list[RequestOutput]:
        from fastserve.ensemble.messaging import read_message

        return [
            read_message("output", array[0], RequestOutput) for array in self.senders[uid].outputs("output")
        ]

    def tokens(self, uid: str, index: int = 0) -> list[int]:
        return [
            token
            for output in self.outputs(uid)
            for each in output.outputs
            if each.index == index
            for token in each.token_ids
        ]

    def failure(self, uid: str) -> Failure | None:
        return self.outputs(uid)[-1].outputs[-1].failure

    def wait(self, uid: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: uid in self.senders, WAIT_SECONDS), (
                f"{uid} was not released"
            )
        self.senders[uid].wait()

    def wait_for_tokens(self, uid: str, count: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while uid not in self.senders or len(self.tokens(uid)) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not holds():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.001)

    def is_preempted(self, uid: str) -> bool:
        return (uid, 0) in self.scheduler._admission._waiting

    def close(self) -> None:
        self.loss = 0.0
        self.engine.finalize()
        self.scheduler.finalize()
        self._released.put(None)


@pytest.fixture
def make_system(pb_utils: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., System]]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engine")
    from fake_runner import make_fake_engine

    from fastserve.ensemble import capacity_publisher, engine_relay, worker_supervisor
    from fastserve.ensemble import scheduler as scheduler_module

    systems: list[System] = []
    monkeypatch.setattr(ThreadWorker, "live", {}, raising=False)
    monkeypatch.setattr(ThreadWorker, "step_seconds", 0.0)
    monkeypatch.setattr(worker_supervisor, "Worker", ThreadWorker)
    monkeypatch.setattr(worker_supervisor, "RESTART_SECONDS", 0.0)
    monkeypatch.setattr(capacity_publisher, "RETRY_SECONDS", 0.002)
    monkeypatch.setattr(capacity_publisher, "REPEAT_SECONDS", 0.05)
    monkeypatch.setattr(engine_relay, "locate", lambda model: ModelFiles(Path("none"), Path("none")))
    monkeypatch.setenv("FASTSERVE_MODEL_CONTROL", "explicit")

    def make(replicas: int = 2, policy: str = "priority_age", **settings: Any) -> System:
        make_engine = staticmethod(
            lambda: make_fake_engine(VOCAB, has_common_queue=True, **{**SETTINGS, **settings})
        )
        monkeypatch.setattr(ThreadWorker, "make_engine", make_engine, raising=False)
        config = Config(replicas=replicas, policy=policy, stream_interval_ms=0.0)
        for module in (engine_relay, scheduler_module):
            monkeypatch.setattr(module, "start_model", lambda: config)
        scheduler, engine = scheduler_module.SchedulerModel(), engine_relay.EngineModel()
        scheduler.initialize({})
        engine.initialize({})
        systems.append(System(pb_utils, scheduler, engine))
        return systems[-1]

    yield make
    for system in systems:
        system.close()


def a_request(
    uid: str, prompt: list[int], priority: int = 0, seconds: float = 600.0, **sampling: Any
) -> Request:
    now = time.monotonic()
    params = SamplingParams(**{"max_tokens": 12, **sampling})
    output = OutputOptions(stream=True)
    return Request(uid, uid, "", prompt, params, output, priority, f"{priority}", now, now + seconds)


def expected(request: Request) -> list[list[int]]:
    """The tokens of each sequence of the request when it runs alone."""
    from fake_runner import make_fake_engine

    engine = make_fake_engine(VOCAB)
    engine.add(Add(request))
    tokens: list[list[int]] = [[] for _ in range(request.sampling.n)]
    while engine.has_work:
        for output in engine.step().outputs:
            tokens[output.index] += output.token_ids
    return tokens


def random_request(rng: random.Random, uid: str) -> Request:
    sampling: dict[str, Any] = {"temperature": rng.choice([0.0, 0.0, 1.0]), "max_tokens": rng.randint(1, 30)}
    if sampling["temperature"] and rng.random() < 0.3:
        sampling["n"] = rng.randint(2, 3)
    if rng.random() < 0.2:
        sampling["repetition_penalty"] = 1.2
    if rng.random() < 0.1:
        sampling["prompt_logprobs"] = 0
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
    return a_request(uid, prompt, rng.randint(-2, 2), **sampling)


@pytest.mark.parametrize("policy", ["priority_age", "mlfq", "fair"])
@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_whole_whatever_is_lost_and_whoever_dies(
    make_system: Any, seed: int, policy: str
) -> None:
    """And equal to what the request has alone; of those that were cancelled or fail, the beginning is."""
    rng = random.Random(seed)
    system = make_system(replicas=1 + seed % 2, policy=policy, num_host_blocks=rng.choice([0, 8]))
    system.loss = 0.1
    requests = [random_request(rng, f"{number}") for number in range(80)]
    stopped = set()
    for request in requests:
        system.submit(request)
        if rng.random() < 0.1 and (uid := str(rng.randrange(len(requests)))) in system.senders:
            system.cancel(uid)
            stopped.add(uid)
        if rng.random() < 0.03:
            rng.choice(list(ThreadWorker.live.values())).kill()
        time.sleep(rng.choice([0.0, 0.001, 0.01]))
    for request in requests:
        system.wait(request.uid)
    failed = set()
    for request in requests:
        answers = expected(request)
        failure = system.failure(request.uid)
        for index, answer in enumerate(answers):
            tokens = system.tokens(request.uid, index)
            assert tokens == (answer if failure is None else answer[: len(tokens)]), request
        if failure is not None:
            assert failure.code == ("CANCELLED" if "cancelled" in failure.message else "UNAVAILABLE")
            failed.add(request.uid)
    assert len(failed - stopped) < len(requests) / 2
    system.wait_until(lambda: system.scheduler._admission.num_waiting == 0)
    for worker in ThreadWorker.live.values():
        system.wait_until(
            lambda worker=worker: not worker.engine.has_work
        )  # its books have been checked then
        assert worker.engine.num_preempted == 0


def test_a_preempted_stream_outlives_its_worker(make_system: Any) -> None:
    """Its client sees a pause, and no difference."""
    ThreadWorker.step_seconds = 0.002
    system = make_system(replicas=1, max_num_seqs=1)
    patient = a_request("patient", [1, 2, 3], max_tokens=40, temperature=1.0)
    system.submit(patient)
    system.wait_for_tokens("patient", 5)
    system.submit(a_request("urgent", [4], 5, max_tokens=60, temperature=0.0))
    system.wait_until(lambda: system.is_preempted("patient"))
    system.wait_for_tokens("urgent", 1)
    ThreadWorker.live[0].kill()
    for uid in ("urgent", "patient"):
        system.wait(uid)
    assert system.failure("urgent").code == "UNAVAILABLE"
    assert system.failure("patient") is None
    assert system.tokens("patient") == expected(patient)[0]


@pytest.mark.parametrize("ends", ["cancelled", "timeout"])
def test_a_preempted_stream_without_a_worker_can_be_ended(make_system: Any, ends: str) -> None:
    ThreadWorker.step_seconds = 0.002
    system = make_system(replicas=1, max_num_seqs=1)
    seconds = 1.0 if ends == "timeout" else 600.0
    system.submit(a_request("patient", [1, 2, 3], seconds=seconds, max_tokens=90, temperature=0.0))
    system.wait_for_tokens("patient", 1)
    system.submit(a_request("urgent", [4], 5, max_tokens=60, temperature=0.0))
    system.wait_until(lambda: system.is_preempted("patient"))
    goes_on = threading.Event()
    starts = ThreadWorker.start
    try:
        ThreadWorker.start = lambda self: (goes_on.wait(WAIT_SECONDS), starts(self))[1]  # type: ignore[method-assign]
        ThreadWorker.live[0].kill()
        system.wait("urgent")
        if ends == "cancelled":
            system.cancel("patient")
        system.wait("patient")
    finally:
        ThreadWorker.start = starts  # type: ignore[method-assign]
        goes_on.set()
    assert system.failure("patient").code == "CANCELLED"
    system.wait_until(lambda: system.scheduler._admission.num_waiting == 0)


def test_a_preempted_stream_goes_on_where_there_is_room(make_system: Any) -> None:
    """On the other replica, though its own is busy for long."""
    ThreadWorker.step_seconds = 0.002
    system = make_system(replicas=2, max_num_seqs=1)
    first, second = (a_request(uid, [1, 2, 3], max_tokens=30, temperature=0.0) for uid in ("first", "second"))
    for request in (first, second):
        system.submit(request)
        system.wait_for_tokens(request.uid, 2)
    system.submit(a_request("urgent", [4], 5, max_tokens=90, temperature=0.0))
    for uid in ("first", "second"):
        system.wait(uid)
    assert not system.senders["urgent"].is_final
    moved = [uid for worker in ThreadWorker.live.values() for uid in worker.num_added]
    assert Counter(moved)["second"] == 2  # it was preempted, being the later one
    for request in (first, second):
        assert system.tokens(request.uid) == expected(request)[0]
    system.wait("urgent")


def test_the_load_is_balanced(make_system: Any) -> None:
    ThreadWorker.step_seconds = 0.001
    system = make_system(replicas=2)
    for number in range(60):
        system.submit(a_request(str(number), [number % VOCAB, 1, 2], max_tokens=20, temperature=0.0))
    for number in range(60):
        system.wait(str(number))
    counts = [sum(worker.num_added.values()) for worker in ThreadWorker.live.values()]
    assert sum(counts) == 60
    assert max(counts) <= 1.1 * 30


def test_one_that_has_nothing_to_do_while_another_works_is_not_taken_for_stalled(
    make_system: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fastserve.ensemble import worker_watch

    monkeypatch.setattr(worker_watch, "STALL_SECONDS", 0.3)
    ThreadWorker.step_seconds = 0.01
    system = make_system(replicas=2)
    system.submit(a_request("a", [1, 2], temperature=0.0, max_tokens=80))
    system.wait("a")
    assert not caplog.records


def test_one_replica_that_dies_leaves_the_server_ready(make_system: Any, pb_utils: Any) -> None:
    system = make_system(replicas=2)
    system.submit(a_request("a", [1], temperature=0.0))
    system.wait("a")
    goes_on = threading.Event()
    starts = ThreadWorker.start
    try:
        ThreadWorker.start = lambda self: (goes_on.wait(WAIT_SECONDS), starts(self))[1]  # type: ignore[method-assign]
        ThreadWorker.live[0].kill()
        pb_utils.server.wait(lambda each: each.metric("fastserve_replicas_ready") == 1)
        system.submit(a_request("b", [1], temperature=0.0))
        system.wait("b")
        assert system.failure("b") is None
        assert pb_utils.server.loads == []
        ThreadWorker.live[1].kill()
        pb_utils.server.wait(lambda each: each.loads == [("unload", "readiness")])
    finally:
        ThreadWorker.start = starts  # type: ignore[method-assign]
        goes_on.set()
    pb_utils.server.wait(lambda each: each.loads == [("unload", "readiness"), ("load", "readiness")])
    pb_utils.server.wait(lambda each: each.metric("fastserve_replicas_ready") == 2)
