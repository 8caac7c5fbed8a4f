"""The socket applications talk to: SOCK_SEQPACKET, peer credentials, descriptors, bounds.

Neither asyncio nor uvloop serves SEQPACKET or receives descriptors, so the sockets are read and
written by the loop's reader and writer callbacks. This module moves packets and guards resources;
what a message means is the handler's business (agent/shell.py).
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from intentd.agent import app_protocol as wire
from intentd.agent.app_protocol import FromApplication, ProtocolError
from intentd.agent.marking import check_socket
from intentd.core.errors import InputError, IntentdError

log = logging.getLogger(__name__)

_PACKETS_A_TURN: Final = 64  # of one connection, then the loop's other callbacks have their turn
_ACCEPTS_A_TURN: Final = 64
_ACCEPT_PAUSE_S: Final = 0.5  # when the process is out of descriptors
_BACKLOG: Final = 1024
_FD_BYTES: Final = array.array("i").itemsize
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_FD_BYTES)
_CREDENTIALS: Final = struct.Struct("3i")
_LINGER: Final = struct.Struct("ii")
# As plain integers: arithmetic on IntFlag members costs more than receiving the packet.
_TRUNCATED: Final = int(socket.MSG_TRUNC)
_DESCRIPTORS_LOST: Final = int(socket.MSG_CTRUNC)
_RECEIVE_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC)


class SocketInUseError(IntentdError):
    """Another agent serves this path."""


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """Bounds of the application socket; each says in its error which one was reached."""

    max_connections: int = 4096
    max_flows_per_connection: int = 16384
    send_backlog: int = 4096


class Handler(Protocol):
    """What the shell does with the socket's events. Calls never overlap and never await."""

    def message(
        self, application: Application, message: FromApplication, passed: socket.socket | None
    ) -> None:
        """passed: a TCP or UDP socket, closed by the caller when this returns."""

    def refused(self, application: Application, error: ProtocolError) -> None:
        """A packet was answered with an ERROR (to be counted)."""

    def left(self, application: Application) -> None:
        """The connection has ended; ``application.flows`` are its open flows."""


class Application:
    """One connection. flows: request number -> the handler's record of an open flow."""

    __slots__ = (
        "_backlog",
        "_sock",
        "_socket",
        "accepting",
        "flows",
        "gid",
        "name",
        "number",
        "pid",
        "uid",
    )

    def __init__(self, server: AppSocket, sock: socket.socket, number: int) -> None:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, self.gid = _CREDENTIALS.unpack(raw)
        self.number = number
        self.name = ""
        self.flows: dict[int, Any] = {}
        self.accepting = True
        self._socket = server
        self._sock = sock
        self._backlog: deque[bytes] = deque()

    def send(self, packet: bytes, fd: int | None = None) -> None:
        """Send, or queue behind a slow reader; one that lets its bound fill is cut off.

        fd: a descriptor to ride along; a packet that must queue goes without it.
        """
        if not self.accepting:
            return
        if not self._backlog:
            try:
                if fd is None:
                    self._sock.send(packet)
                else:
                    socket.send_fds(self._sock, [packet], [fd])
            except BlockingIOError:
                self._socket.writable(self, True)
            except OSError:
                self._socket.doom(self)
                return
            else:
                return
        if len(self._backlog) >= self._socket.limits.send_backlog:
            log.warning("application does not read, cut off", extra={"pid": self.pid})
            self._socket.doom(self)
            return
        self._backlog.append(packet)

    def flush(self) -> None:
        """Called when the socket takes packets again."""
        try:
            while self._backlog:
                self._sock.send(self._backlog[0])
                self._backlog.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._socket.doom(self)
            return
        self._socket.writable(self, False)


class Detached(NamedTuple):
    """A connection to be handed on: its descriptor, and what its application has still to read."""

    application: Application
    fd: int
    backlog: tuple[bytes, ...]


class AppSocket:
    """The listening socket and its connections. Life: ``open``, ``close``; both once."""

    def __init__(
        self,
        path: Path,
        handler: Handler,
        *,
        limits: SocketLimits | None = None,
        mode: int = 0o666,
        allowed: Callable[[int, int], bool] = lambda uid, gid: True,
    ) -> None:
        """mode: of the socket's file. allowed(uid, gid): whether this peer may connect."""
        self.path = path
        self.limits = limits or SocketLimits()
        self.connections: dict[int, Application] = {}
        self.rejected = 0
        self._handler = handler
        self._mode = mode
        self._allowed = allowed
        self._listener: socket.socket | None = None
        self._lock_fd = -1
        self._doomed: list[Application] = []
        self._next_number = 0
        self._resume: asyncio.TimerHandle | None = None
        self._detached = False

    # -- life -------------------------------------------------------------------------------------

    def open(self, kept: socket.socket | None = None, *, accept: bool = True) -> None:
        """Bind and listen, or go on with the socket of the agent before (kept).

        accept False: nothing is accepted before ``resume``.

        Raises SocketInUseError if another agent has the path.
        """
        self._loop = asyncio.get_running_loop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._take_lock()
        except BaseException:
            if kept is not None:
                kept.close()
            raise
        if kept is not None:
            if _listens_at(kept, self.path):
                self._listener = kept
                if accept:
                    self.resume()
                return
            kept.close()
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            self._remove_stale()
            listener.bind(str(self.path))
            os.chmod(self.path, self._mode)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            self._release_lock()
            raise
        self._listener = listener
        if accept:
            self.resume()

    def resume(self) -> None:
        """Accept, and read what the connections say."""
        assert self._listener is not None, "open comes first"
        self._loop.add_reader(self._listener.fileno(), self._accept)
        for application in self.connections.values():
            self._loop.add_reader(application._sock.fileno(), self._readable, application)

    def adopt(self, sock: socket.socket, name: str, backlog: Iterable[bytes]) -> Application | None:
        """Go on with a connection of the agent before; None: its application has gone."""
        sock.setblocking(False)
        self._next_number += 1
        try:
            application = Application(self, sock, self._next_number)
        except OSError:
            sock.close()
            return None
        application.name = name
        application._backlog.extend(backlog)
        self.connections[application.number] = application
        if application._backlog:
            self.writable(application, True)
        return application

    def detach(self) -> tuple[list[int], list[Detached]]:
        """Leave everything to the agent that follows: the listener, and the connections.

        Nothing is read or sent any more; ``close`` closes our side.
        """
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        listeners = [] if self._listener is None else [self._listener.fileno()]
        for listener in listeners:
            self._loop.remove_reader(listener)
        left = []
        for application in list(self.connections.values()):
            if not application.accepting:
                continue
            application.accepting = False
            self._loop.remove_reader(application._sock.fileno())
            self._loop.remove_writer(application._sock.fileno())
            left.append(Detached(application, application._sock.fileno(), (*application._backlog,)))
        self._detached = True
        return listeners, left

    def stop_accepting(self) -> None:
        """No new connections; those open stay."""
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._listener = None
        if not self._detached:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close everything; the handler hears of each connection's end."""
        self.stop_accepting()
        for application in list(self.connections.values()):
            if self._detached:
                application._sock.close()
            else:
                self._end(application)
        self._doomed.clear()
        self._release_lock()

    def _take_lock(self) -> None:
        """One agent a path: an advisory lock, gone with the process, decides who it is."""
        lock = self.path.with_name(f"{self.path.name}.lock")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise SocketInUseError(
                f"socket {self.path}: another agent (pid {holder}) serves it; "
                "a host runs one agent, stop that one or set another run_dir"
            ) from None
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd

    def _release_lock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _remove_stale(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise SocketInUseError(f"socket {self.path}: a file that is not a socket is there")
        self.path.unlink()

    # -- accepting --------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            if self._listener is None:
                return
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause(error)
                    return
                continue  # the peer has gone already
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._next_number += 1
        try:
            application = Application(self, sock, self._next_number)
        except OSError:
            sock.close()
            return
        reason = ""
        if not self._allowed(application.uid, application.gid):
            reason = f"uid {application.uid}: expected one this agent serves"
        elif len(self.connections) >= self.limits.max_connections:
            reason = f"connections: {len(self.connections)} are open, the bound"
        if reason:
            self.rejected += 1
            application.send(wire.encode_error(0, wire.E_LIMIT, reason))
            sock.close()
            return
        self.connections[application.number] = application
        self._loop.add_reader(sock.fileno(), self._readable, application)

    def _pause(self, error: OSError) -> None:
        """Out of descriptors: the listener stays readable, so look away instead of spinning."""
        assert self._listener is not None
        log.warning("cannot accept applications", extra={"reason": str(error)})
        self._loop.remove_reader(self._listener.fileno())
        self._resume = self._loop.call_later(_ACCEPT_PAUSE_S, self._resume_accepting)

    def _resume_accepting(self) -> None:
        self._resume = None
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    # -- packets ----------------------------------------------------------------------------------

    def _readable(self, application: Application) -> None:
        receive = application._sock.recvmsg
        for _ in range(_PACKETS_A_TURN):
            if not application.accepting:
                return
            try:
                packet, ancillary, flags, _ = receive(
                    wire.MAX_PACKET, _ANCILLARY_BYTES, _RECEIVE_FLAGS
                )
            except BlockingIOError:
                return
            except OSError:
                self._end(application)
                return
            if not packet and not ancillary:
                self._end(application)
                return
            fds = _descriptors(ancillary) if ancillary else []
            passed: socket.socket | None = None
            try:
                if flags & _TRUNCATED:
                    raise ProtocolError(
                        wire.E_MALFORMED, "packet", "more", f"at most {wire.MAX_PACKET} bytes"
                    )
                message = wire.decode_request(packet)
                if fds or flags & _DESCRIPTORS_LOST:
                    passed = _take_socket(fds, message)
                self._handler.message(application, message, passed)
            except ProtocolError as error:
                application.send(error.packet())
                self._handler.refused(application, error)
            finally:
                if passed is not None:
                    _close_socket(passed)
                for fd in fds:
                    os.close(fd)

    def writable(self, application: Application, wanted: bool) -> None:
        """Call back when the application's socket takes packets (or no longer)."""
        fd = application._sock.fileno()
        if wanted:
            self._loop.add_writer(fd, application.flush)
        else:
            self._loop.remove_writer(fd)

    # -- ends -------------------------------------------------------------------------------------

    def doom(self, application: Application) -> None:
        """End a connection soon: not inside the call that noticed, which may be in the gate."""
        if application.accepting:
            application.accepting = False
            self._doomed.append(application)
            if len(self._doomed) == 1:
                self._loop.call_soon(self._reap)

    def _reap(self) -> None:
        doomed, self._doomed = self._doomed, []
        for application in doomed:
            self._end(application)

    def _end(self, application: Application) -> None:
        if self.connections.pop(application.number, None) is None:
            return
        application.accepting = False
        fd = application._sock.fileno()
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        application._sock.close()
        application._backlog.clear()
        self._handler.left(application)


def _listens_at(sock: socket.socket, path: Path) -> bool:
    """Whether applications that go to path still meet this socket."""
    try:
        return sock.getsockname() == str(path) and stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


# -- descriptors ----------------------------------------------------------------------------------


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    return list(fds)


def _take_socket(fds: list[int], message: FromApplication) -> socket.socket:
    """The one TCP or UDP socket passed with message, removed from fds. Raises ProtocolError."""
    request = message.request
    wanted = isinstance(message, wire.Mark) or (
        isinstance(message, wire.Open) and bool(message.flags & wire.WANTS_MARK)
    )
    if not wanted:
        raise ProtocolError(
            wire.E_SOCKET, "descriptors", len(fds), "none with this message", request
        )
    if len(fds) != 1:
        raise ProtocolError(wire.E_SOCKET, "descriptors", len(fds), "one socket", request)
    expected = "a TCP or UDP socket (IPv4 or IPv6)"
    try:
        passed = socket.socket(fileno=fds[0])
    except OSError:
        raise ProtocolError(wire.E_SOCKET, "descriptor", "no socket", expected, request) from None
    fds.clear()
    try:
        check_socket(passed)
    except InputError as error:
        _close_socket(passed)
        raise ProtocolError(
            wire.E_SOCKET, error.field, error.value, error.expected, request
        ) from None
    return passed


def _close_socket(sock: socket.socket) -> None:
    """Close our duplicate at once: while it is open, the application's close sends no FIN.

    If ours is the last one and the application had set SO_LINGER, the close waits for the peer,
    whatever O_NONBLOCK says: that wait must not be the loop's.
    """
    try:
        on, seconds = _LINGER.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.size)
        )
    except OSError:
        on = seconds = 0
    if on and seconds:
        fd = sock.detach()
        threading.Thread(target=os.close, args=(fd,), name="linger", daemon=True).start()
    else:
        sock.close()
