"""One connection of a member to one controller: a DEALER socket, watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import zmq

from intentd.core.errors import IntentdError
from intentd.daemons.kit.codec import limit_socket
from intentd.daemons.kit.config import ControllerSection
from intentd.daemons.kit.handshake import HandshakeWatch
from intentd.daemons.kit.keys import CurveKeys
from intentd.daemons.kit.zap import secure_client
from intentd.daemons.kit.zmqfd import ZmqStream

PAIR_BACKOFF_MAX_S: Final = 1.0  # a controller that begins to lead is to be found soon


class Line:
    """Connects by itself, again and again. Raises IntentdError for an address that cannot be.

    shut_out: the socket will not connect any more (see handshake); set by its owner.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        section: ControllerSection,
        keys: tuple[CurveKeys, bytes] | None,
        *,
        on_message: Callable[[Line, list[bytes]], None],
        on_refused: Callable[[Line, str, bool], None],
        on_cut: Callable[[Line], None],
    ) -> None:
        self.endpoint = endpoint
        self.shut_out = False
        socket = context.socket(zmq.DEALER)
        watch: HandshakeWatch | None = None
        most_s = section.backoff_max_s
        if len(section.endpoints) > 1:
            most_s = min(most_s, PAIR_BACKOFF_MAX_S)
        try:
            limit_socket(socket, endpoint)
            socket.setsockopt(zmq.RECONNECT_IVL, max(1, int(section.backoff_min_s * 1000)))
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, max(1, int(most_s * 1000)))
            if keys is not None:
                secure_client(socket, *keys)
            watch = HandshakeWatch(
                socket,
                encrypted=keys is not None,
                on_refused=lambda reason, final: on_refused(self, reason, final),
                on_link=lambda up: None if up else on_cut(self),
            )
            socket.connect(endpoint)
        except BaseException as error:
            if watch is not None:
                watch.stop()
            socket.close(linger=0)
            if isinstance(error, (zmq.ZMQError, OverflowError)):
                raise IntentdError(f"controller.endpoint: {endpoint}: {error}") from None
            raise
        self.stream = ZmqStream(socket, self._message)
        self._watch = watch
        self._on_message = on_message

    def start(self) -> None:
        self.stream.start()
        self._watch.start()

    def stop(self, linger_ms: int = 0) -> None:
        """linger_ms: how long what was sent may still take to leave."""
        self._watch.stop()
        self.stream.stop(linger_ms)

    def _message(self, parts: list[Any]) -> None:
        self._on_message(self, parts)
