"""The admin socket: a Unix stream socket, one JSON object a line, for intentctl on this host.

Request ``{"command": "status", "args": {...}}``, answer ``{"ok": true, "result": {...}}`` or
``{"ok": false, "error": "why", "code": "refused"}``. The socket's mode is 0660 and the peer's
credentials are checked on every connection: root, the daemon's own user, or the configured group.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.kit.metrics import Metrics

_log = logging.getLogger(__name__)

MAX_REQUEST_BYTES: Final = 1 << 20
MAX_ANSWER_BYTES: Final = 64 << 20
MAX_CONNECTIONS: Final = 64
IDLE_TIMEOUT_S: Final = 300.0
_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h; the socket module does not name it

# Who asks, as the kernel says: set while a command is handled.
peer_uid: ContextVar[int] = ContextVar("peer_uid", default=-1)

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


class AdminUnreachableError(IntentdError):
    """No daemon answers on the socket."""


class AdminRefusedError(IntentdError):
    """The daemon answered no; code is ``refused``, ``unknown_command``, ``bad_request``, ..."""

    def __init__(self, text: str, code: str = "refused") -> None:
        self.code = code
        super().__init__(text)


def encode_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=str).encode() + b"\n"


def decode_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Command and arguments of one line. Raises AdminRefusedError with code bad_request."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise AdminRefusedError("request: expected one JSON object a line", "bad_request") from None
    if not isinstance(request, dict):
        raise AdminRefusedError("request: expected a JSON object", "bad_request")
    unknown = sorted(set(request) - {"command", "args"})
    if unknown:
        raise AdminRefusedError(
            f"request.{unknown[0]:.80}: unknown field, expected command and args", "bad_request"
        )
    command, args = request.get("command"), request.get("args", {})
    if not isinstance(command, str) or not command or len(command) > 80:
        raise AdminRefusedError(
            f"request.command: got {command!r:.80}, expected a command name", "bad_request"
        )
    if not isinstance(args, dict):
        raise AdminRefusedError(
            f"request.args: got {args!r:.80}, expected an object", "bad_request"
        )
    return command, args


class AdminServer:
    """Serves one handler on one path; bounded in connections, request size and idle time."""

    def __init__(self, path: Path, group: str, handler: Handler, metrics: Metrics) -> None:
        self.path = path
        self._group = group
        self._gid = _group_id(group)
        self._handler = handler
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Bind and serve. The caller holds the role's lock, so a file at the path is stale."""
        if len(os.fsencode(self.path)) > 107:
            raise IntentdError(
                f"admin.path: got {str(self.path)!r}, "
                "expected at most 107 bytes (the limit of a Unix socket)"
            )
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o117)
        try:
            listener.bind(str(self.path))
        except OSError as error:
            listener.close()
            raise IntentdError(f"admin.path: cannot bind {self.path}: {error.strerror}") from None
        finally:
            os.umask(before)
        if self._gid is not None:
            try:
                os.chown(self.path, -1, self._gid)
            except PermissionError:
                listener.close()
                raise IntentdError(
                    f"admin.group: cannot give {self.path} to group {self._group}: "
                    "expected a group of this daemon's own user"
                ) from None

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.create_task(self._serve(reader, writer), name="admin-connection")

        self._server = await asyncio.start_unix_server(
            connected, sock=listener, limit=MAX_REQUEST_BYTES
        )

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def permitted(self, uid: int, gid: int, groups: frozenset[int]) -> bool:
        if uid in (0, os.geteuid()):
            return True
        return self._gid is not None and (gid == self._gid or self._gid in groups)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            await self._converse(reader, writer)
        except (ConnectionError, TimeoutError):
            pass
        finally:
            self._open -= 1
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid, gid, groups = peer_credentials(writer.get_extra_info("socket"))
        peer_uid.set(uid)  # a connection is a task of its own, and so is its context
        if not self.permitted(uid, gid, groups):
            self._metrics.admin_requests.labels("denied").inc()
            _log.warning("admin connection denied", extra={"uid": uid, "gid": gid})
            await self._answer(writer, _refusal(f"uid {uid} may not use this socket", "denied"))
            return
        if self._open > MAX_CONNECTIONS:
            await self._answer(writer, _refusal("too many connections", "busy"))
            return
        while True:
            try:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    line = await reader.readline()
            except ValueError:  # StreamReader: longer than the limit
                self._metrics.admin_requests.labels("bad_request").inc()
                await self._answer(
                    writer,
                    _refusal(f"request: longer than {MAX_REQUEST_BYTES} bytes", "bad_request"),
                )
                return
            if not line:
                return
            await self._answer(writer, await self._handle(line))

    async def _handle(self, line: bytes) -> dict[str, Any]:
        try:
            command, args = decode_request(line)
            result = await self._handler(command, args)
        except AdminRefusedError as error:
            self._metrics.admin_requests.labels(error.code).inc()
            return _refusal(str(error), error.code)
        except IntentdError as error:
            code = "bad_request" if isinstance(error, InputError) else "refused"
            self._metrics.admin_requests.labels(code).inc()
            return _refusal(str(error), code)
        except Exception as error:  # noqa: BLE001  one bad command must not end the daemon
            self._metrics.admin_requests.labels("internal").inc()
            self._metrics.errors.labels("admin").inc()
            _log.exception("admin command failed")
            return _refusal(f"internal error: {type(error).__name__}: {error}", "internal")
        self._metrics.admin_requests.labels("ok").inc()
        return {"ok": True, "result": result}

    async def _answer(self, writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        writer.write(encode_line(answer))
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            await writer.drain()


def _refusal(text: str, code: str) -> dict[str, Any]:
    return {"ok": False, "error": text, "code": code}


def _group_id(group: str) -> int | None:
    if not group:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise IntentdError(
            f"admin.group: got {group!r}, expected a group of this machine"
        ) from None


def peer_credentials(connection: Any) -> tuple[int, int, frozenset[int]]:
    """uid, gid and supplementary groups of a Unix socket's peer, as the kernel recorded them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, gid = struct.unpack("3i", raw)
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * 1024)
    except OSError:  # more groups than fit, or a kernel before 4.13
        return uid, gid, frozenset()
    return uid, gid, frozenset(struct.unpack(f"{len(packed) // 4}I", packed))


class AdminClient:
    """The other side, blocking (``call``) or in a loop (``acall``)."""

    def __init__(self, path: Path | str, timeout_s: float = 30.0) -> None:
        self.path = Path(path)
        self.timeout_s = timeout_s

    def call(self, command: str, /, **args: Any) -> dict[str, Any]:
        """One request. Raises AdminUnreachableError, or AdminRefusedError with the reason."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self.timeout_s)
                connection.connect(str(self.path))
                connection.sendall(encode_line({"command": command, "args": args}))
                answer = bytearray()
                while not answer.endswith(b"\n"):
                    chunk = connection.recv(1 << 16)
                    if not chunk or len(answer) > MAX_ANSWER_BYTES:
                        break
                    answer += chunk
        except OSError as error:
            raise self._unreachable(error) from None
        return _result(bytes(answer), self.path)

    async def acall(self, command: str, /, **args: Any) -> dict[str, Any]:
        """As ``call``, without blocking the loop."""
        try:
            async with asyncio.timeout(self.timeout_s):
                reader, writer = await asyncio.open_unix_connection(
                    str(self.path), limit=MAX_ANSWER_BYTES
                )
                try:
                    writer.write(encode_line({"command": command, "args": args}))
                    await writer.drain()
                    answer = await reader.readline()
                finally:
                    writer.close()
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise self._unreachable(error) from None
        return _result(answer, self.path)

    def _unreachable(self, error: Exception) -> AdminUnreachableError:
        reason = getattr(error, "strerror", None) or str(error) or "no answer in time"
        return AdminUnreachableError(f"{self.path}: {reason}")


def _result(answer: bytes, path: Path) -> dict[str, Any]:
    if not answer.endswith(b"\n"):
        raise AdminUnreachableError(f"{path}: the daemon closed the connection without an answer")
    try:
        plain = json.loads(answer)
    except ValueError:
        raise AdminUnreachableError(f"{path}: the answer is not JSON") from None
    if not plain.get("ok"):
        raise AdminRefusedError(str(plain.get("error")), str(plain.get("code", "refused")))
    result = plain.get("result")
    return result if isinstance(result, dict) else {"result": result}
