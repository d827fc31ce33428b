"""Tells `scheduler` what room the engine has, from a thread of its own, always the newest numbers."""

from __future__ import annotations

import logging
import threading

from fastserve.errors import RequestError
from fastserve.triton_server.tensors import call, message_tensor
from fastserve.types import Room

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2


class RoomTeller:
    """A mailbox of one message: what is not yet sent is replaced by what is newer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last: Room | None = None
        self._next: Room | None = None
        self._is_open = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="room", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Begins to send: the server is up. Triton server 2.51 was seen to crash otherwise."""
        with self._changed:
            self._is_open = True
            self._changed.notify()

    def tell(self, incarnation: str, received: int, free_slots: int, lowest_key: float | None) -> None:
        """The numbers of `Room`, under the caller's lock; nothing is sent where they have not changed."""
        last = self._last
        serial = 0 if last is None else last.serial
        if last == Room(incarnation, serial, received, free_slots, lowest_key):
            return
        with self._changed:
            self._last = self._next = Room(incarnation, serial + 1, received, free_slots, lowest_key)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or (self._is_open and self._next is not None))
                if self._stopping:
                    return
                room, self._next = self._next, None
            if room is not None and not self._sent(room):
                self._try_again(room)

    def _sent(self, room: Room) -> bool:
        try:
            call("scheduler", [message_tensor("room", room)])
        except RequestError as error:
            logger.debug("room not told: %s", error)
            return False
        return True

    def _try_again(self, room: Room) -> None:
        """`scheduler` may still be loading; newer numbers that have come meanwhile are sent instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
            if self._next is None:
                self._next = room

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
