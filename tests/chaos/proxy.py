"""`Proxy`: a TCP port in front of a server's socket, whose connections can be hurt while in use.

cut            both ends are reset; what was on the way is gone
lose_answer    the next answer is thrown away after the server did what was asked, then cut
tear_answer    half of the next answer arrives, then cut
half_close     the client is told that the server ended; what it still sends is executed
delay          nothing passes in either direction for a while
"""

import asyncio
import random
import socket
import struct
import threading
from contextlib import suppress
from typing import Self

CUTS = ("cut", "lose_answer", "tear_answer", "half_close")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER for 0 s: close() sends a reset


class _Link:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client, self.server = client, server
        #: What becomes of the next answer.
        self.fault = ""
        self._is_half_closed = False
        self._open = asyncio.Event()
        self._open.set()

    async def pass_up(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(1 << 16):
            await self._open.wait()
            self.server.write(data)
            await self.server.drain()
        with suppress(OSError):
            self.server.write_eof()

    async def pass_down(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(1 << 16):
            await self._open.wait()
            if self._is_half_closed:
                continue
            if self.fault == "tear_answer":
                self.client.write(data[: len(data) // 2])
                await self.client.drain()
            if self.fault:
                self.cut()
                return
            self.client.write(data)
            await self.client.drain()
        self.client.close()  # the server has gone

    def cut(self) -> None:
        for writer in (self.client, self.server):
            if writer is self.client:
                sock = writer.get_extra_info("socket")
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def half_close(self) -> None:
        self._is_half_closed = True
        with suppress(OSError):
            self.client.write_eof()

    def delay(self, seconds: float) -> None:
        self._open.clear()
        asyncio.get_running_loop().call_later(seconds, self._open.set)


class Proxy:
    """Runs in a thread of its own; use it in a `with`. `url` is where clients connect."""

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path
        self._links: list[_Link] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}"

    def hurt(self, rng: random.Random, fault: str, delay_s: float = 0.0) -> bool:
        """Do it to a connection drawn at random; False if there was none."""
        future = asyncio.run_coroutine_threadsafe(self._hurt(rng, fault, delay_s), self._loop)
        return future.result(10.0)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for link in self._links:
            link.cut()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self._path)
        except OSError:  # the server is down
            writer.transport.abort()
            return
        link = _Link(writer, up_writer)
        self._links.append(link)
        try:
            with suppress(OSError):
                await asyncio.gather(link.pass_up(reader), link.pass_down(up_reader))
        finally:
            self._links.remove(link)
            link.cut()

    async def _hurt(self, rng: random.Random, fault: str, delay_s: float) -> bool:
        if not self._links:
            return False
        link = rng.choice(self._links)
        if fault == "cut":
            link.cut()
        elif fault == "half_close":
            link.half_close()
        elif fault == "delay":
            link.delay(delay_s)
        else:
            link.fault = fault
        return True
