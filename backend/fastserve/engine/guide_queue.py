"""Requests that wait until their guide is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

from fastserve.engine.guides import CompiledGuide, GuideCompiler
from fastserve.errors import RequestError
from fastserve.types import Add, Guide

GUIDE_WAIT_SECONDS = 0.01
"""For an engine that has nothing else to do."""


class GuideQueue:
    """They leave it in the order in which the guides are compiled, or before that by `pop`."""

    def __init__(self, compiler: GuideCompiler) -> None:
        self._compiler = compiler
        self._waiting: dict[str, tuple[Add, Future[CompiledGuide]]] = {}
        """By uid."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, uid: str) -> bool:
        return uid in self._waiting

    def __iter__(self) -> Iterator[Add]:
        return (message for message, _ in self._waiting.values())

    def add(self, message: Add, guide: Guide) -> None:
        """Takes a request in, and has its guide compiled."""
        self._waiting[message.request.uid] = (message, self._compiler.compile(guide))

    def pop(self, uid: str) -> Add:
        """Lets go of a request that waits. Raises KeyError for one that does not."""
        return self._waiting.pop(uid)[0]

    def pop_compiled(self, has_time: bool) -> Iterator[tuple[Add, CompiledGuide | RequestError]]:
        """Lets go of the requests whose guide is compiled, or refused. With `has_time` it waits a little."""
        if not self._waiting:
            return
        futures = [future for _, future in self._waiting.values()]
        wait(futures, GUIDE_WAIT_SECONDS if has_time else 0, FIRST_COMPLETED)
        self._compiler.abandon_heavy()
        for uid, (message, future) in list(self._waiting.items()):
            if future.done():
                del self._waiting[uid]
                try:
                    guide: CompiledGuide | RequestError = future.result()
                except RequestError as error:
                    guide = error
                yield message, guide
