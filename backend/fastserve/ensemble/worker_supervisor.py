"""Keeps a worker for the model `engine`: one that dies is replaced, and the server is not ready meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.worker import Worker
from fastserve.engine.worker_pipe import FromWorker, ToWorker
from fastserve.ensemble.metrics import Counter
from fastserve.ensemble.worker_watch import WorkerWatch
from fastserve.types import Ready

logger = logging.getLogger(__name__)

RESTART_SECONDS = 1.0
"""Between a worker that died while it started and the next one."""


class WorkerSupervisor:
    """Always has a worker, which may not be ready, or be dead; any thread may send to it."""

    def __init__(
        self,
        config: Config,
        files: ModelFiles,
        replica: int,
        on_message: Callable[[FromWorker], None],
        on_death: Callable[[str, bool], None],
        on_health: Callable[[str, str | None], None],
        restarts: Counter,
    ) -> None:
        """`on_message` and `on_death` are called from one thread, as by `Worker`. `on_death` is given what
        has happened and whether the worker had been ready; after it another worker starts. `on_health` is
        told, of a source, what is wrong with it, and None when nothing is any more."""
        self._config = config
        self._files = files
        self._replica = replica
        self._on_message = on_message
        self._on_death = on_death
        self._restarts = restarts
        self._on_health = on_health
        self._watch = WorkerWatch(lambda problem: self._tell("stall", problem))
        self._num_messages = 0
        """From all workers."""
        self._is_ready = False
        self._is_initialized = False
        """Then a worker that dies is replaced, and requests to other models may be sent."""
        self._started = threading.Event()
        self._lifecycle = threading.Lock()
        self._stopping = False
        self._worker = self._make_worker()

    def start(self) -> None:
        """Starts the first worker."""
        self._worker.start()

    def wait_until_ready(self) -> None:
        """Waits for the first worker. Raises TritonModelException where it ends before it is ready."""
        self._started.wait()
        if not self._is_initialized:
            raise pb_utils.TritonModelException(
                "the engine's worker ended before it was ready: see its error above"
            )

    def send(self, message: ToWorker) -> None:
        """Sends to the present worker; never waits."""
        self._worker.send(message)

    def look(self, has_requests: bool) -> None:
        """Looks whether the worker still answers or computes; to be called every few seconds."""
        self._watch.look(has_requests, self._num_messages, self._worker.cpu_seconds())

    def _make_worker(self) -> Worker:
        return Worker(
            self._config,
            self._files,
            self._replica,
            self._receive,
            self._replace,
            lambda problem: self._tell("pipe", problem),
        )

    def _tell(self, source: str, problem: str | None) -> None:
        if self._is_initialized:
            self._on_health(source, problem)

    def _receive(self, message: FromWorker) -> None:
        self._num_messages += 1
        self._on_message(message)
        if isinstance(message, Ready):
            self._is_ready = self._is_initialized = True
            self._on_health("worker", None)
            self._started.set()

    def _replace(self, cause: str) -> None:
        """Called when a worker has died, and again if it raises."""
        had_been_ready, self._is_ready = self._is_ready, False
        self._on_death(cause, had_been_ready)
        if not self._is_initialized:
            self._started.set()
            return
        logger.error("the engine's worker %s; starting another", cause)
        self._on_health("worker", f"the engine's worker {cause}")
        self._restarts.add(1)
        if not had_been_ready:
            time.sleep(RESTART_SECONDS)
        worker = self._make_worker()
        with self._lifecycle:
            if self._stopping:
                return
            self._worker = worker
        worker.start()

    def stop(self) -> None:
        """Ends the worker."""
        with self._lifecycle:
            self._stopping = True
        self._worker.stop()
