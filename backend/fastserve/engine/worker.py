"""The worker process: an engine, its loop, and the pipe to whoever started it.

Parent to worker: `Add`, `Cancel`, `Shutdown`. Worker to parent: `Ready` once, then one `StepOutput` a step.
A worker whose parent is gone finds its pipe closed and leaves.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Protocol

from fastserve.config import Config
from fastserve.model_files import ModelFiles
from fastserve.types import Add, Cancel, Ready, Shutdown, StepOutput, decode, encode

if TYPE_CHECKING:
    from fastserve.engine.engine import Engine

ToWorker = Add | Cancel | Shutdown
FromWorker = Ready | StepOutput
logger = logging.getLogger(__name__)


class Inbox(Protocol):
    """Where the engine's loop finds what to do."""

    def receive(self, block: bool) -> ToWorker | None:
        """The next message; None when there is none and `block` is false."""


def run_engine(engine: Engine, inbox: Inbox, send: Callable[[StepOutput], None]) -> None:
    """Steps the engine for as long as it has work, sleeps on the inbox when it has none, until `Shutdown`."""
    while True:
        message = inbox.receive(block=not engine.has_work)
        while message is not None:
            if isinstance(message, Add):
                engine.add(message.request)
            elif isinstance(message, Cancel):
                engine.cancel(message.uid, message.outcome, message.index)
            else:
                return
            message = inbox.receive(block=False)
        if engine.has_work:
            send(engine.step())


class _PipeInbox:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def receive(self, block: bool) -> ToWorker | None:
        if not block and not self._connection.poll():
            return None
        return decode(self._connection.recv_bytes(), ToWorker)  # type: ignore[arg-type]


def _worker_main(config: Config, files: ModelFiles, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the launcher's to handle
    from fastserve.engine.loading import load_engine

    try:
        engine = load_engine(config, files)
        ready = Ready(uuid.uuid4().hex, engine.max_model_len, engine.stats())
        connection.send_bytes(encode(ready))
        run_engine(engine, _PipeInbox(connection), lambda output: connection.send_bytes(encode(output)))
    except (EOFError, BrokenPipeError):
        return


class Worker:
    """The parent's end of a worker process."""

    def __init__(
        self,
        config: Config,
        files: ModelFiles,
        on_message: Callable[[FromWorker], None],
        on_death: Callable[[int | None], None],
    ) -> None:
        """Starts the process. `on_message` and `on_death` (with the exit code) are called from one thread.

        `on_death` is not called for a worker that `stop` has ended.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_worker_main, args=(config, files, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._stopping = False
        self._send_lock = threading.Lock()
        self._reader = threading.Thread(
            target=self._read, args=(on_message, on_death), name="worker-reader", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Says nothing of a worker that has died: `on_death` does."""
        try:
            with self._send_lock:
                self._connection.send_bytes(encode(message))
        except OSError:
            logger.debug("the worker is gone; %s was not sent", type(message).__name__)

    def _read(self, on_message: Callable[[FromWorker], None], on_death: Callable[[int | None], None]) -> None:
        while True:
            try:
                data = self._connection.recv_bytes()
            except (EOFError, OSError):
                break
            on_message(decode(data, FromWorker))  # type: ignore[arg-type]
        self._process.join()
        if not self._stopping:
            on_death(self._process.exitcode)

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the process, by force after `timeout` seconds."""
        self._stopping = True
        self.send(Shutdown())
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
        self._reader.join(timeout)
