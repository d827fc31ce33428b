"""The HTTP port with TLS: Triton server 2.51 has none for HTTP, so bytes are relayed to it on loopback.

It knows nothing of HTTP: what a client closes is closed behind it too, by which Triton server cancels a
stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading

CHUNK_BYTES = 1 << 16
HANDSHAKE_SECONDS = 10.0
"""For a client that has connected."""


class TlsRelay:
    """Listens at an address with TLS and relays to another. A thread of its own."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext, target: tuple[str, int]) -> None:
        """`listener`: bound; it is closed with the relay."""
        self._listener = listener
        self._context = context
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="tls-relay", daemon=True)

    def start(self) -> None:
        """Begins to listen."""
        self._thread.start()

    def close(self) -> None:
        """Ends all connections and the thread."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._relay, sock=self._listener, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_SECONDS
        )
        await self._stopped.wait()
        server.close()
        connections = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection(*self._target)
        except OSError:  # the server starts, or is gone
            await _close(writer)
            return
        directions = [
            asyncio.create_task(_copy(reader, inner_writer)),
            asyncio.create_task(_copy(inner_reader, writer)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in directions:
                task.cancel()
            for each in (inner_writer, writer):
                await _close(each)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one of the ends is gone."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
