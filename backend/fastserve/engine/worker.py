"""The worker process: an engine, its loop, and the pipe to whoever started it.

Parent to worker: `Add`, `Cancel`, `Shutdown`. Worker to parent: `Ready` once, then one `StepOutput` a step.
A worker whose parent is gone finds its pipe closed and leaves.

Both ends read the pipe in a thread that does nothing else and never waits for the other direction, and what
the pipe may have no space for is written in another: a pipe that is full keeps neither process from reading.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import select
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import psutil

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.service_thread import ServiceThread
from fastserve.types import Add, Cancel, Ready, Shutdown, StepOutput, decode, encode

if TYPE_CHECKING:
    from fastserve.engine.engine import Engine

ToWorker = Add | Cancel | Shutdown
FromWorker = Ready | StepOutput
LoadEngine = Callable[[Config, ModelFiles], "Engine"]
logger = logging.getLogger(__name__)

SMALL_BYTES = 1 << 15
"""Linux says that a socket can be written while three quarters of its buffer, some 200 kB, are free."""
MAX_UNSENT_STEPS = 64
"""Steps that wait for the pipe; then the engine waits too: a slow parent costs no memory without bound."""
EXIT_SECONDS = 5.0
"""For a worker that has closed its pipe, or was told to leave; then it is killed."""


class ParentGoneError(Exception):
    """The parent's end of the pipe is closed."""


def run_engine(
    engine: Engine, inbox: queue.SimpleQueue[ToWorker | Exception], send: Callable[[StepOutput], None]
) -> None:
    """Steps the engine for as long as it has work, sleeps on the inbox when it has none, until `Shutdown`.

    Raises an exception that it finds in the inbox, and what `Engine.step` raises.
    """
    while True:
        for message in _receive(inbox, block=not engine.has_work):
            if isinstance(message, Add):
                engine.add(message.request)
            elif isinstance(message, Cancel):
                engine.cancel(message.uid, message.outcome, message.index)
            elif isinstance(message, Exception):
                raise message
            else:
                return
        if engine.has_work:
            send(engine.step())


def _receive(inbox: queue.SimpleQueue[ToWorker | Exception], block: bool) -> Iterator[ToWorker | Exception]:
    """All messages that are there; with `block` it waits for the first."""
    with suppress(queue.Empty):
        while True:
            yield inbox.get(block)
            block = False


class _ParentPipe:
    """The worker's end of the pipe: received while the engine computes, sent while it computes on.

    The usual step is small and the pipe has space for it: the engine's thread sends it itself, since a third
    thread beside the kernels' would take one of their cores at each step (4 % at 4 sequences on 2 cores).
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.inbox: queue.SimpleQueue[ToWorker | Exception] = queue.SimpleQueue()
        """Messages that came; last, the exception that ended the pipe."""
        self._outbox: queue.Queue[bytes | None] = queue.Queue(MAX_UNSENT_STEPS)
        self._writable = select.poll()
        self._writable.register(connection.fileno(), select.POLLOUT)
        self._is_open = True
        self._sender = threading.Thread(target=self._send_all, name="pipe-sender", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive_all, name="pipe-receiver", daemon=True).start()

    def send(self, message: FromWorker) -> None:
        """Sends at once what cannot block; anything else goes through `pipe-sender`, in order."""
        data = encode(message)
        if self._outbox.unfinished_tasks == 0 and len(data) <= SMALL_BYTES and self._writable.poll(0):
            self._send(data)
        else:
            self._outbox.put(data)

    def close(self) -> None:
        """Waits until all is sent, or the parent is gone."""
        self._outbox.put(None)
        self._sender.join()

    def _receive_all(self) -> None:
        try:
            while True:
                self.inbox.put(decode(self._connection.recv_bytes(), ToWorker))  # type: ignore[arg-type]
        except Exception as error:
            self._end(error)

    def _send_all(self) -> None:
        while (data := self._outbox.get()) is not None:
            self._send(data)
            self._outbox.task_done()

    def _send(self, data: bytes) -> None:
        """After a failure it drops what comes: the engine must get rid of its steps until it sees that."""
        if not self._is_open:
            return
        try:
            self._connection.send_bytes(data)
        except Exception as error:
            self._is_open = False
            self._end(error)

    def _end(self, error: Exception) -> None:
        is_gone = isinstance(error, EOFError | OSError)
        self.inbox.put(ParentGoneError(repr(error)) if is_gone else error)


def _load_engine(config: Config, files: ModelFiles) -> Engine:
    from fastserve.engine.engine_loader import load_engine  # here: the parent loads no torch

    return load_engine(config, files)


def _worker_main(config: Config, files: ModelFiles, connection: Connection, load: LoadEngine) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the launcher's to handle
    engine = load(config, files)
    pipe = _ParentPipe(connection)
    try:
        pipe.send(Ready(uuid.uuid4().hex, engine.max_model_len, engine.stats()))
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
        on_message: Callable[[FromWorker], None],
        on_death: Callable[[str], None],
        on_health: Callable[[str | None], None] = lambda problem: None,
        load: LoadEngine = _load_engine,
    ) -> None:
        """`on_message` and `on_death` (with what happened) are called from one thread.

        `on_death` is not called for a worker that `stop` has ended. A worker of which a message could not be
        read, or handled by `on_message`, is ended: nobody knows any more which tokens have come of it.
        `on_health`: see `ServiceThread`, of the threads that read and write. `load` makes the engine in the
        worker; it is found there by its name.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_worker_main, args=(config, files, self._theirs, load), daemon=True
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
