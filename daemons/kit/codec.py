"""Control messages as bytes (msgpack within bounds), and the limits of control-plane sockets."""

from __future__ import annotations

from typing import Final

import msgpack
import zmq

from intentd.core.errors import WireError
from intentd.core.messages import Message, NumberedPolicy, PolicyAck, from_plain, to_plain

MAX_MESSAGE_BYTES: Final = 4 << 20
MAX_ITEMS: Final = 1 << 18  # entries of one array or map
QUEUE: Final = 64


def encode(message: Message) -> bytes:
    """Raises WireError when the message is larger than a receiver accepts."""
    data: bytes = msgpack.packb(to_plain(message))
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message: {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """Raises WireError for anything that is not a message of ours."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message: {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    try:
        plain = msgpack.unpackb(
            data,
            strict_map_key=True,
            max_str_len=MAX_MESSAGE_BYTES,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise WireError(f"message: not msgpack within bounds ({error!s:.80})") from None
    return from_plain(plain)


def policy_order(policy: NumberedPolicy | PolicyAck) -> tuple[int, int]:
    """What orders policies of one application; larger wins."""
    return policy.era, policy.number


def limit_socket(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Limits every control-plane socket has."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
