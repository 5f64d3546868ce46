"""A TCP proxy that can be cut: the WAN link between a leaf and its hub, or the wire of one node."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class TcpProxy:
    """Forwards to `target` until it is cut, or until `stop_after` more bytes went down (to the client) or up."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._open = True
        self._left: dict[str, int] = {}
        self.passed = {"down": 0, "up": 0}
        self.stopped = asyncio.Event()

    def stop_after(self, way: str, count: int) -> None:
        """Let `count` more bytes pass `down` or `up`, then none until `restore`."""
        self.stopped.clear()
        self._left[way] = count

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def close(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        """Every connection dies, and new ones are refused."""
        self._open = False
        for writer in self._writers:
            writer.transport.abort()

    def restore(self) -> None:
        self._open = True
        self._left.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for source, sink, way in ((reader, far_writer, "up"), (far_reader, writer, "down")):
            pump = asyncio.create_task(self._pump(source, sink, way))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):
            while data := await source.read(64 * 1024):
                if way in self._left:
                    self._left[way] -= len(data)
                    if self._left[way] < 0:
                        self.stopped.set()
                        await asyncio.Event().wait()  # this connection says no more, however long it lives
                self.passed[way] += len(data)
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
        self._writers.discard(sink)
