"""Several answers that come at once, as one stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from fastserve.openai_api.front_door import Stream
from fastserve_client import Chunk


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all streams as they come, each with its stream's index.

    Raises the first FastServeError. When this ends, however it does, every stream is closed.
    """
    chunks: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue(maxsize=1)

    async def read(index: int, stream: Stream) -> None:
        """Hands on the chunks of one stream, and None or an error at its end."""
        try:
            async for chunk in stream:
                await chunks.put((index, chunk))
            await chunks.put((index, None))
        except Exception as error:  # handed over to whoever reads
            await chunks.put((index, error))

    readers = [asyncio.ensure_future(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            index, item = await chunks.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for stream, reader in zip(streams, readers, strict=True):
            reader.cancel()
            await stream.close()
        for reader in readers:
            with contextlib.suppress(asyncio.CancelledError):
                await reader
