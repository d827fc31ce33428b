"""The worker's end of the pipe to whoever started it. Neither direction waits for the other."""

from __future__ import annotations

import queue
import select
import threading
from multiprocessing.connection import Connection

from fastserve.types import Add, Cancel, Forget, Ready, Resume, Shutdown, StepOutput, decode, encode

ToWorker = Add | Cancel | Forget | Resume | Shutdown
FromWorker = Ready | StepOutput

SMALL_BYTES = 1 << 15
"""Linux says that a socket can be written while three quarters of its buffer, some 200 kB, are free."""
MAX_UNSENT_STEPS = 64
"""Steps that wait for the pipe; then the engine waits too: a slow parent costs no memory without bound."""


class ParentGoneError(Exception):
    """The parent's end of the pipe is closed."""


class WorkerPipe:
    """Received while the engine computes, sent while it computes on.

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
