"""CURVE on ZeroMQ sockets: server and client set-up, and the allow list of client keys.

libzmq asks a handler at inproc://zeromq.zap.01 of the same context about every connection (ZAP,
ZeroMQ RFC 27). Ours runs in the event loop like any other socket: no thread, no zmq.auth.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Final

import zmq

from intentd.core.errors import IntentdError
from intentd.daemons.kit.keys import CurveKeys
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.zmqfd import ZmqStream

_log = logging.getLogger(__name__)

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ZAP_DOMAIN: Final = b"intentd"
MAX_LOGGED: Final = 256
REBIND_S: Final = 1.0
REBIND_PAUSE_S: Final = 0.001


def secure_server(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    """Make a socket a CURVE server, before bind. Start a ZapServer on its context first."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)


def rekey_server(socket: zmq.Socket[bytes], keys: CurveKeys, endpoint: str) -> None:
    """Take new keys on a bound CURVE server: those connected come back, and need the new key.

    Raises IntentdError when the address is gone meanwhile; nothing listens then.
    """
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.unbind(endpoint)
    deadline = time.monotonic() + REBIND_S
    while True:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            # libzmq closes the old listener in a thread of its own
            if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                reason = f"{endpoint}: not bound again with its new key: {error}"
                raise IntentdError(reason) from None
            time.sleep(REBIND_PAUSE_S)
        else:
            return


def secure_client(socket: zmq.Socket[bytes], keys: CurveKeys, server_public: bytes) -> None:
    """Make a socket a CURVE client, before connect."""
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_public)


def user_key(frame: zmq.Frame) -> bytes:
    """The CURVE key of the peer that sent a received frame; empty without CURVE."""
    try:
        return bytes.fromhex(str(frame.get("User-Id")))
    except (zmq.ZMQError, ValueError):
        return b""


class ZapServer:
    """Lets in the keys of an allow list; a peer's User-Id is its key in hex (``user_key``)."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        allowed: Collection[bytes],
        metrics: Metrics,
    ) -> None:
        self._context = context
        self._allowed = frozenset(allowed)
        self._metrics = metrics
        self._stream: ZmqStream | None = None
        self._logged: set[bytes] = set()

    def start(self) -> None:
        """Answer from now on. Once a context, before any secured socket binds."""
        socket = self._context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(ZAP_ENDPOINT)
        self._stream = ZmqStream(socket, self._asked)
        self._stream.start()

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.stop()
            self._stream = None

    def allow(self, allowed: Collection[bytes]) -> None:
        """Replace the list; connections that stand stay until they close, so ask ``user_key``."""
        self._allowed = frozenset(allowed)
        self._logged.clear()

    def _asked(self, parts: list[bytes]) -> None:
        assert self._stream is not None
        request = parts[1] if len(parts) > 1 else b""
        mechanism = parts[5] if len(parts) > 5 else b""
        key = parts[6] if len(parts) > 6 else b""
        if mechanism != b"CURVE" or key not in self._allowed:
            self._metrics.link_dropped.labels("denied_key").inc()
            if key not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add(key)
                address = parts[3].decode("ascii", "replace") if len(parts) > 3 else ""
                _log.warning("key not allowed", extra={"key": key.hex(), "address": address})
            answer = [b"1.0", request, b"400", b"key not allowed", b"", b""]
        else:
            answer = [b"1.0", request, b"200", b"OK", key.hex().encode(), b""]
        self._stream.send(answer)
