"""HTTP/1.1 to providers, no more than that takes: one request at a time on kept connections.

aiohttp's client costs as much processor time as the rest of a request together; what is needed here
is a POST with a body in memory and its answer. Bodies come by length, in chunks or until the end of
the connection. Whatever is not plain HTTP/1.1 ends the connection with BadAnswerError; nothing is
guessed. No redirects, cookies, proxies or compression.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from intentd.core.errors import IntentdError

MAX_HEAD_BYTES: Final = 64 << 10
MAX_CHUNK_LINE: Final = 1024
MAX_TRAILER_BYTES: Final = 16 << 10
HIGH_WATER_BYTES: Final = 1 << 18
KEEP_S: Final = 30.0
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?\Z")
_LINE_END: Final = b"\r\n"
_HEX: Final = re.compile(rb"[0-9a-fA-F]{1,15}\Z")


class ConnectError(IntentdError):
    """No connection: nothing was sent."""


class CutError(IntentdError):
    """The connection ended before the answer was whole."""


class BadAnswerError(IntentdError):
    """The answer is not HTTP."""


class Origin:
    """Where a provider is: host, port and whether by TLS; and the path before every request's."""

    __slots__ = ("base_path", "host", "host_header", "port", "tls")

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self.tls = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        self.base_path = parts.path.rstrip("/")
        name = f"[{self.host}]" if ":" in self.host else self.host
        default = self.port == (443 if self.tls else 80)
        self.host_header = name if default else f"{name}:{self.port}"

    def head(self, path: str, headers: dict[str, str]) -> bytes:
        """Everything of a POST that stays the same, up to the length of its body."""
        lines = [f"POST {self.base_path}{path} HTTP/1.1", f"Host: {self.host_header}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        text = "\r\n".join(lines)
        if any(not 32 <= ord(char) < 127 for line in lines for char in line):
            raise ValueError("a header that is not printable ASCII")
        return text.encode() + b"\r\nContent-Length: "


class Connection(asyncio.Protocol):
    """One connection and the answer that is under way on it.

    Phases: IDLE -> HEAD -> LENGTH | CHUNKED | TO_END -> IDLE, or closed.
    """

    IDLE, HEAD, LENGTH, CHUNKED, TO_END = range(5)

    def __init__(self, pool: Connections, key: tuple[str, int, bool]) -> None:
        self._pool = pool
        self._key = key
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._phase = self.IDLE
        self._rest = b""  # of a head, a chunk's line or a trailer
        self._left = 0  # bytes of the body, or of the chunk and its line end
        self._trailer = False
        self._parts: list[bytes] = []
        self._size = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[], None] | None = None
        self._direct: Callable[[bytes], bool] | None = None
        self._failure: Exception | None = None
        self._keep = True
        self._whole = False
        self.closed = False
        self.used = False
        self.idle_since_s = 0.0
        self.status = 0
        self.headers = b""  # lower case, from the first line's end to the blank line

    # -- for the pool and the caller -------------------------------------------------------------

    async def ask(self, request: bytes, body: bytes) -> None:
        """Send a request; returns when the head of its answer is there. Raises CutError,
        BadAnswerError."""
        self._phase = self.HEAD
        self._whole = False
        self._parts.clear()
        self._size = 0
        self.used = True
        self._transport.write(request + body)
        while self._phase == self.HEAD:
            await self._wait()
        if self._failure is not None and not self._parts and not self._whole:
            raise self._failure

    def header(self, name: bytes) -> str:
        """The value of the first header of this name (lower case); "" when there is none."""
        start = self.headers.find(b"\r\n" + name + b":")
        if start < 0:
            return ""
        start += len(name) + 3
        end = self.headers.find(b"\r\n", start)
        return self.headers[start : end if end >= 0 else None].strip().decode("latin-1")

    @property
    def content_length(self) -> int | None:
        """Bytes of the body when it told so in advance."""
        return self._size + self._left if self._phase == self.LENGTH or self._whole else None

    async def readany(self) -> bytes:
        """What has come, at least a byte; b"" at the end of the body. Raises CutError,
        BadAnswerError, and what set_exception was given."""
        while not self._parts:
            if self._whole:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._wait()
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._size = 0
        if self._paused:
            self._paused = False
            with contextlib.suppress(RuntimeError):
                self._transport.resume_reading()
        return data

    def take(self) -> bytes | None:
        """What has come, without waiting; None when nothing has, b"" at the end of the body.
        Raises as readany."""
        if self._parts:
            parts = self._parts
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            self._size = 0
            return data
        if self._whole:
            return b""
        if self._failure is not None:
            raise self._failure
        return None

    def push_to(
        self, sink: Callable[[], None] | None, direct: Callable[[bytes], bool] | None = None
    ) -> None:
        """Have sink called whenever there is something to take, in place of waking a reader.

        direct: offered what came with its chunk's lines, where a chunk begins and nothing waits;
        True: it took it, which it may only where that is one whole chunk (RFC 9112, section 7.1).
        """
        self._sink = sink
        self._direct = direct

    def hold(self, *, held: bool) -> None:
        """Stop or go on reading from the provider."""
        if held != self._paused and not self.closed:
            self._paused = held
            with contextlib.suppress(RuntimeError):
                if held:
                    self._transport.pause_reading()
                else:
                    self._transport.resume_reading()

    @property
    def whole(self) -> bool:
        """Whether all of the body has come."""
        return self._whole

    def at_eof(self) -> bool:
        return self._whole and not self._parts

    def set_exception(self, error: Exception) -> None:
        """Break whoever reads."""
        self._fail(error)

    def release(self) -> None:
        """Done with this answer: the connection is kept if the answer came whole."""
        if self._whole and self._keep and not self.closed and not self._paused:
            self._parts.clear()
            self._failure = None
            self._sink = self._direct = None
            self._phase = self.IDLE
            self.idle_since_s = self._loop.time()
            self._pool.give_back(self._key, self)
        else:
            self.close()

    def close(self) -> None:
        self._sink = self._direct = None
        if not self.closed:
            self.closed = True
            self._pool.gone()
            if self._transport is not None:
                self._transport.abort()

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._phase == self.TO_END and error is None:
            self._end()
            if self._sink is not None:
                self._sink()
        elif not self._whole:
            self._fail(CutError("the provider closed the connection"))
        self.close()

    def eof_received(self) -> bool:
        return False  # close: connection_lost says what it means

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        direct = self._direct
        if (
            direct is not None
            and phase == self.CHUNKED
            and not (self._left or self._rest or self._parts or self._trailer)
            and direct(data)
        ):
            return
        try:
            if phase == self.CHUNKED:
                self._feed_chunks(data)
            elif phase == self.LENGTH:
                self._feed_length(data)
            elif phase == self.HEAD:
                self._feed_head(data)
            elif phase == self.TO_END:
                self._add(data)
            else:
                raise BadAnswerError("data that nobody asked for")
        except BadAnswerError as error:
            self._keep = False
            self._whole = False
            self._fail(error)
            self.close()
            return
        if self._sink is not None:
            self._sink()
            return
        waiter = self._waiter
        if waiter is not None and (self._parts or self._whole):
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        if self._size > HIGH_WATER_BYTES and not self._paused and not self._whole:
            self._paused = True
            self._transport.pause_reading()

    # -- inside ----------------------------------------------------------------------------------

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
        if self._sink is not None:
            self._sink()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self._phase == self.HEAD:
            self._phase = self.IDLE

    def _add(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)

    def _end(self) -> None:
        self._whole = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _feed_head(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise BadAnswerError("headers without an end")
            self._rest = data
            return
        first, mark, headers = data[:end].partition(b"\r\n")
        found = _STATUS.match(first)
        if found is None or end > MAX_HEAD_BYTES:
            raise BadAnswerError("no HTTP status")
        rest = data[end + 4 :]
        status = int(found[2])
        if status < 200:
            if status == 101:
                raise BadAnswerError("another protocol")
            self._feed_head(rest)  # 100, 103: the answer follows
            return
        self.status = status
        self.headers = lower = mark + headers.lower()
        connection = self.header(b"connection")
        self._keep = "close" not in connection and (found[1] == b"1" or "keep-alive" in connection)
        coding = self.header(b"transfer-encoding")
        length = self.header(b"content-length")
        if coding:
            if coding != "chunked" or lower.count(b"\r\ntransfer-encoding:") > 1:
                raise BadAnswerError("a transfer encoding other than chunked")
            if length:
                self._keep = False  # RFC 9112, section 6.3: the length means nothing
            self._phase = self.CHUNKED
            self._left = 0
            self._trailer = False
            self._feed_chunks(rest)
        elif status in (204, 304):
            self._phase = self.LENGTH
            self._left = 0
            self._feed_length(rest)
        elif length:
            if (
                not length.isdecimal()
                or len(length) > 15
                or lower.count(b"\r\ncontent-length:") > 1
            ):
                raise BadAnswerError("a content length that is none")
            self._phase = self.LENGTH
            self._left = int(length)
            self._feed_length(rest)
        else:
            self._phase = self.TO_END
            self._keep = False
            if rest:
                self._add(rest)
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            if not waiter.done():
                waiter.set_result(None)

    def _feed_length(self, data: bytes) -> None:
        size = len(data)
        if size > self._left:
            raise BadAnswerError("more than the length said")
        if size:
            self._left -= size
            self._add(data)
        if not self._left:
            self._end()

    def _feed_chunks(self, data: bytes) -> None:
        """RFC 9112, section 7.1. self._left: of the chunk under way, its line end included."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        place, size = 0, len(data)
        if not self._left and not self._trailer:  # mostly: one whole chunk
            start = data.find(b"\r\n", 0, 18) + 2
            if (
                start > 2
                and data.endswith(b"\r\n")
                and _HEX.match(data[: start - 2])
                and int(data[: start - 2], 16) == size - start - 2 > 0
            ):
                self._add(data[start:-2])
                return
        while place < size:
            left = self._left
            if left > 2:
                body = data[place : place + left - 2] if place or size > left - 2 else data
                self._add(body)
                self._left -= len(body)
                place += len(body)
                continue
            if left:
                ending = data[place : place + left]
                if ending != _LINE_END[2 - left : 2 - left + len(ending)]:
                    raise BadAnswerError("a chunk of another size than it said")
                self._left -= len(ending)
                place += len(ending)
                continue
            line_end = data.find(b"\r\n", place)
            if line_end < 0:
                self._rest = data[place:]
                limit = MAX_TRAILER_BYTES if self._trailer else MAX_CHUNK_LINE
                if len(self._rest) > limit:
                    raise BadAnswerError("a chunk without a size")
                return
            line = data[place:line_end]
            place = line_end + 2
            if self._trailer:
                if not line:
                    if place < size:
                        raise BadAnswerError("data after the last chunk")
                    self._end()
                    return
                continue
            text = line.partition(b";")[0].strip()
            if not _HEX.match(text):
                raise BadAnswerError("a chunk without a size")
            length = int(text, 16)
            if length:
                self._left = length + 2
            else:
                self._trailer = True


class Connections:
    """Connections to all providers, kept open between requests, the last used first."""

    def __init__(self, *, connect_timeout_s: float, max_connections: int) -> None:
        self.connect_timeout_s = connect_timeout_s
        self.max_connections = max_connections
        self._idle: dict[tuple[str, int, bool], deque[Connection]] = {}
        self._open = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._tls: ssl.SSLContext | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def post(self, origin: Origin, head: bytes, body: bytes) -> Connection:
        """The answer's head; the caller reads, then releases or closes. Raises ConnectError,
        CutError, BadAnswerError."""
        request = head + b"%d\r\n\r\n" % len(body)
        connection = await self._get((origin.host, origin.port, origin.tls))
        try:
            await connection.ask(request, body)
        except BaseException:
            connection.close()
            raise
        return connection

    def give_back(self, key: tuple[str, int, bool], connection: Connection) -> None:
        if self._closed:
            connection.close()
            return
        self._idle.setdefault(key, deque()).append(connection)
        if self._waiting:
            self._wake()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(KEEP_S / 2, self._sweep)

    def gone(self) -> None:
        self._open -= 1
        if self._waiting:
            self._wake()

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for kept in self._idle.values():
            for connection in list(kept):
                connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close in the next round of the loop

    async def _get(self, key: tuple[str, int, bool]) -> Connection:
        while True:
            kept = self._idle.get(key)
            while kept:
                connection = kept.pop()
                if not connection.closed:
                    return connection
            if self._open < self.max_connections or self._drop_idle():
                break
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self._wake()
                raise
        self._open += 1
        host, port, tls = key
        context = self._context() if tls else None
        made: list[Connection] = []

        def make() -> Connection:
            made.append(Connection(self, key))
            return made[-1]

        try:
            async with asyncio.timeout(self.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(make, host, port, ssl=context)
        except (OSError, ssl.SSLError) as error:
            self._failed(made)
            raise ConnectError(f"no connection: {type(error).__name__}") from None
        except BaseException:
            self._failed(made)
            raise
        return made[-1]

    def _failed(self, made: list[Connection]) -> None:
        """Take back the place, unless a connection made in vain has given it back already."""
        if made and not made[-1].closed:
            made[-1].close()
        elif not made:
            self.gone()

    def _drop_idle(self) -> bool:
        """Make room by closing a connection to whomever that nobody uses."""
        for kept in self._idle.values():
            while kept:
                connection = kept.popleft()
                if not connection.closed:
                    connection.close()
                    return True
        return False

    def _wake(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def _sweep(self) -> None:
        """Close what has been idle for long, before its provider does."""
        loop = asyncio.get_running_loop()
        before_s = loop.time() - KEEP_S
        for key, kept in list(self._idle.items()):
            while kept and (kept[0].closed or kept[0].idle_since_s < before_s):
                kept.popleft().close()
            if not kept:
                del self._idle[key]
        self._timer = loop.call_later(KEEP_S / 2, self._sweep) if self._idle else None

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls
