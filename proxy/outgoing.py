"""Answers as bytes: what aiohttp's responses build header by header is a few joins here.

They take the place of web.Response and web.StreamResponse in the low-level server, which asks of a
response no more than ``prepare``, ``write_eof``, ``status`` and ``keep_alive``. aiohttp is pinned
exactly; tests/unit/proxy/test_proxy_outgoing.py holds what these rely on.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time

LARGE_BYTES: Final = 1 << 16
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus
}


def head(status: int, headers: Mapping[str, str], content_type: str, more: str) -> bytes:
    """Status line and headers; more: further lines, each with its end. Raises ValueError for a
    value with a line end in it."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\n") != len(headers) or text.count("\r") != len(headers):
        raise ValueError("a header with a line end in it")
    line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"
    return (
        f"{line}{text}Content-Type: {content_type}\r\n{more}"
        f"Date: {rfc822_formatted_time()}\r\nServer: intentd\r\n\r\n"
    ).encode()


class Prepared(web.StreamResponse):
    """What both kinds share. The base class is not initialised: its headers are not used."""

    def __init__(self, status: int, headers: Mapping[str, str], content_type: str) -> None:
        self._status = status
        self._reason = ""
        self._state = {}
        self._lines = headers
        self._type = content_type
        self._transport: Any = None
        self._protocol: Any = None

    def _open(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Note where to write. Raises ConnectionResetError when nobody is there any more."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client left")
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        self._transport = transport
        self._protocol = request.protocol
        return request.writer

    def _connection_line(self, request: web.BaseRequest) -> str:
        if request.version == HttpVersion11:
            return "" if self._keep_alive else "Connection: close\r\n"
        return "Connection: keep-alive\r\n" if self._keep_alive else ""


class WholeResponse(Prepared):
    """An answer that is all there: one write."""

    def __init__(
        self,
        body: bytes,
        headers: Mapping[str, str],
        status: int = 200,
        content_type: str = JSON,
    ) -> None:
        super().__init__(status, headers, content_type)
        self.content = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if self._eof_sent:
            return None
        writer = self._open(request)
        body = self.content
        more = f"Content-Length: {len(body)}\r\n{self._connection_line(request)}"
        data = head(self._status, self._lines, self._type, more)
        self._transport.write(data if request.method == "HEAD" else data + body)
        writer.output_size += len(data)  # so that no error is sent after it
        self._eof_sent = True
        if len(body) > LARGE_BYTES:
            await writer.drain()
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """It is sent."""


class EventStream(Prepared):
    """Server-sent events, in chunks (HTTP/1.0: until the end of the connection)."""

    def __init__(self, headers: Mapping[str, str], content_type: str = EVENTS) -> None:
        super().__init__(200, headers, content_type)
        self._in_chunks = True
        self._writer: AbstractStreamWriter | None = None

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if self._writer is not None:
            return self._writer
        self._in_chunks = request.version == HttpVersion11
        if not self._in_chunks:
            self._keep_alive = False
        writer = self._writer = self._open(request)
        more = "Transfer-Encoding: chunked\r\n" if self._in_chunks else ""
        data = head(self._status, self._lines, self._type, more + self._connection_line(request))
        self._transport.write(data)
        writer.output_size += len(data)
        return writer

    @property
    def full(self) -> bool:
        """Whether the client is slow: what is put now only fills memory."""
        return bool(self._protocol._paused)

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Send without waiting. Raises ConnectionResetError when the client left."""
        transport = self._transport
        if transport.is_closing():
            raise ConnectionResetError("the client left")
        transport.write(b"%x\r\n%b\r\n" % (len(data), bytes(data)) if self._in_chunks else data)

    def put_chunk(self, chunk: bytes) -> bool:
        """Send a chunk with its lines (RFC 9112, section 7.1) as it is; False where this answer is
        not sent in chunks or the client left."""
        transport = self._transport
        if not self._in_chunks or transport.is_closing():
            return False
        transport.write(chunk)
        return True

    async def drain(self) -> None:
        if self._writer is not None:
            await self._writer.drain()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, and wait while the client is slow. Raises ConnectionResetError."""
        self.put(data)
        if self._protocol._paused:
            await self.drain()

    async def write_eof(self, data: bytes = b"") -> None:
        if self._eof_sent:
            return
        if data:
            await self.write(data)
        self._eof_sent = True
        if self._in_chunks and not self._transport.is_closing():
            self._transport.write(b"0\r\n\r\n")


class Gone(Prepared):
    """For a client that left in the middle of its answer: nothing is sent, nothing is logged as
    an error, and the connection ends."""

    def __init__(self) -> None:
        super().__init__(499, {}, "")

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        raise ConnectionResetError("the client left")
