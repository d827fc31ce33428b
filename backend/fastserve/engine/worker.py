"""The worker process: an engine, its loop, and the pipe to whoever started it.

Parent to worker: `Add`, `Resume`, `Forget`, `Cancel`, `Shutdown`. Worker to parent: `Ready` once, then one
`StepOutput` a step.
A worker whose parent is gone finds its pipe closed and leaves.

Both ends read the pipe in a thread that does nothing else and never waits for the other direction, and what
the pipe may have no space for is written in another: a pipe that is full keeps neither process from reading.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import psutil

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.worker_pipe import FromWorker, ParentGoneError, ToWorker, WorkerPipe
from fastserve.openmp import limit_spinning
from fastserve.service_thread import ServiceThread
from fastserve.types import Add, Cancel, Forget, Ready, Resume, Shutdown, StepOutput, decode, encode

if TYPE_CHECKING:
    from fastserve.engine.engine import Engine

LoadEngine = Callable[[Config, ModelFiles, int], "Engine"]
logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 1.0
"""How often deadlines are looked at while all requests wait elsewhere."""
GIVE_WAY_SECONDS = 0.001
"""After first tokens, where kernels take all cores: on its way to the client a token passes some ten threads,
each of which would wait for a core that the next step has. It takes a fortieth of a short prompt's time."""
EXIT_SECONDS = 5.0
"""For a worker that has closed its pipe, or was told to leave; then it is killed."""


def run_engine(
    engine: Engine, inbox: queue.SimpleQueue[ToWorker | Exception], send: Callable[[StepOutput], None]
) -> None:
    """Steps the engine for as long as it has work, sleeps on the inbox when it has none, until `Shutdown`.

    Raises an exception that it finds in the inbox, and what `Engine.step` raises.
    """
    while True:
        timeout = 0.0 if engine.has_work else DEADLINE_SECONDS if engine.num_preempted else None
        for message in _receive(inbox, timeout):
            if isinstance(message, Add):
                engine.add(message)
            elif isinstance(message, Cancel):
                engine.cancel(message.uid, message.outcome, message.index)
            elif isinstance(message, Resume):
                engine.resume(message.uid, message.index)
            elif isinstance(message, Forget):
                engine.forget(message.uid)
            elif isinstance(message, Exception):
                raise message
            else:
                return
        if engine.has_work or engine.num_preempted:
            send(engine.step())
            if engine.gives_way:
                time.sleep(GIVE_WAY_SECONDS)


def _receive(
    inbox: queue.SimpleQueue[ToWorker | Exception], timeout: float | None
) -> Iterator[ToWorker | Exception]:
    """All messages that are there; it waits `timeout` seconds for the first, None: as long as it takes."""
    with suppress(queue.Empty):
        while True:
            yield inbox.get(timeout=timeout) if timeout != 0.0 else inbox.get(block=False)
            timeout = 0.0


def _load_engine(config: Config, files: ModelFiles, replica: int) -> Engine:
    limit_spinning()  # before torch is imported, and OpenMP with it
    from fastserve.engine.engine_loader import load_engine  # here: the parent loads no torch

    return load_engine(config, files, replica, has_common_queue=True)


def _worker_main(
    config: Config, files: ModelFiles, replica: int, connection: Connection, load: LoadEngine
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the launcher's to handle
    engine = load(config, files, replica)
    pipe = WorkerPipe(connection)
    engine.on_loss(pipe.inbox.put)
    try:
        pipe.send(Ready(uuid.uuid4().hex, engine.max_model_len, engine.block_size, engine.stats()))
        run_engine(engine, pipe.inbox, pipe.send)
    except ParentGoneError as error:
        logger.debug("the parent is gone: %s", error)
    finally:
        pipe.close()


class Worker:
    """The parent's end of a worker process."""

    def __init__(
        self,
        config: Config,
        files: ModelFiles,
        replica: int,
        on_message: Callable[[FromWorker], None],
        on_death: Callable[[str], None],
        on_health: Callable[[str | None], None] = lambda problem: None,
        load: LoadEngine = _load_engine,
    ) -> None:
        """`on_message` and `on_death` (with what happened) are called from one thread.

        `on_death` is not called for a worker that `stop` has ended. A worker of which a message could not be
        read, or handled by `on_message`, is ended: nobody knows any more which tokens have come of it.
        `on_health`: see `ServiceThread`, of the threads that read and write. `load` makes the engine in the
        worker, given settings, files and the number of the replica; it is found there by its name.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_worker_main, args=(config, files, replica, self._theirs, load), daemon=True
        )
        self._on_message = on_message
        self._on_death = on_death
        self._lifecycle = threading.Lock()
        """Held while it starts or is told to stop: one that is stopped first does not start."""
        self._stopping = False
        self._failure: Exception | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = ServiceThread("worker-writer", self._write, self._give_up, on_health)
        self._reader = ServiceThread("worker-reader", self._read, self._give_up, on_health)

    def start(self) -> None:
        """Starts the process. What `send` was given before goes to it first."""
        with self._lifecycle:
            if self._stopping:
                return
            self._process.start()
            self._theirs.close()
            self._writer.start()
            self._reader.start()

    @property
    def pid(self) -> int | None:
        """The process's id; None: it has not been started."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Seconds of CPU that the process has taken; 0 where there is none."""
        try:
            times = psutil.Process(self.pid or 0).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def send(self, message: ToWorker) -> None:
        """Never waits. Says nothing of a worker that has died: `on_death` does."""
        self._outbox.put(encode(message))

    def _write(self) -> bool:
        data = self._outbox.get()
        if data is None:
            return False
        try:
            self._connection.send_bytes(data)
        except OSError as error:
            logger.debug("the worker is gone, a message was not sent: %s", error)
        return True

    def _read(self) -> bool:
        try:
            data = self._connection.recv_bytes()
        except (EOFError, OSError):
            return self._end()
        if self._failure is None:
            self._on_message(decode(data, FromWorker))  # type: ignore[arg-type]
        return True

    def _give_up(self, error: Exception) -> None:
        """Ends a worker that cannot be understood: its pipe then ends, and `on_death` is called."""
        self._failure = error
        self._process.kill()

    def _end(self) -> bool:
        self._process.join(EXIT_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._outbox.put(None)
        if not self._stopping:
            self._on_death(self._cause())
        return False

    def _cause(self) -> str:
        if self._failure is None:
            return f"ended (code {self._process.exitcode})"
        return f"was ended (it could not be understood: {type(self._failure).__name__}: {self._failure})"

    def stop(self, timeout: float = EXIT_SECONDS) -> None:
        """Ends the process, by force after `timeout` seconds."""
        with self._lifecycle:
            self._stopping = True
            if self._process.pid is None:
                return
        self.send(Shutdown())
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
        self._outbox.put(None)
        for thread in (self._reader, self._writer):
            thread.join(timeout)
