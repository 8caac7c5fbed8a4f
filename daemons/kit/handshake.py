"""What the monitor of a connecting ZeroMQ socket tells: up, down, and why a handshake failed.

Without it wrong keys look like an absent peer. And libzmq does not try again after a handshake
that ended for a reason of the protocol or of the allow list (4.3.5, session_base_t::engine_error):
whoever wants the connection has to make the socket anew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

import zmq

from intentd.daemons.kit.zmqfd import ZmqStream

_EVENT: Final = struct.Struct("=HI")  # zmq_socket_monitor(3): event, value
_MECHANISM_MISMATCH: Final = 0x11000002  # zmq.h, ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class HandshakeWatch:
    """Watches one socket; make it before ``connect``, stop it before the socket closes.

    on_link(up) when a connection stands or ends. on_refused(reason, final) when a handshake failed;
    final: this socket will not try again.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        *,
        encrypted: bool,
        on_refused: Callable[[str, bool], None],
        on_link: Callable[[bool], None] = lambda up: None,
    ) -> None:
        self._socket = socket
        self._encrypted = encrypted
        self._on_link = on_link
        self._on_refused = on_refused
        self._stream = ZmqStream(socket.get_monitor_socket(_EVENTS), self._event)

    def start(self) -> None:
        self._stream.start()

    def stop(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._stream.stop()

    def _event(self, parts: list[Any]) -> None:
        event, value = _EVENT.unpack_from(parts[0])
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._on_link(True)
            case zmq.EVENT_DISCONNECTED:
                self._on_link(False)
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._on_refused("key_file: its public key is not on the other side's list", True)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if value == _MECHANISM_MISMATCH:
                self._on_refused(
                    "key_file: set here, but the other side has no keys"
                    if self._encrypted
                    else "key_file: empty here, but the other side asks for keys",
                    True,
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._on_refused(f"the other side breaks ZeroMQ's protocol ({value:#x})", True)
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._on_refused(
                    "server_key_file: not the other side's public key, or it ended meanwhile"
                    if self._encrypted
                    else "the other side ended the connection before it stood",
                    False,
                )
