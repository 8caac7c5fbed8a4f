"""The generator's request: what a client sends on a persistent connection to have bytes sent.

``>4sIQIBBH``: magic "ITG1", flow index, size in bytes, socket priority (0: leave), DSCP, class,
reserved; 24 bytes. The answer is ``size`` bytes and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from intentd.core.errors import WireError

_REQUEST: Final = struct.Struct(">4sIQIBBH")
_MAGIC: Final = b"ITG1"
REQUEST_BYTES: Final = _REQUEST.size
MAX_SIZE_BYTES: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Request:
    flow: int
    size_bytes: int
    priority: int
    dscp: int
    class_index: int


def encode_request(request: Request) -> bytes:
    return _REQUEST.pack(
        _MAGIC,
        request.flow & 0xFFFFFFFF,
        request.size_bytes,
        request.priority,
        request.dscp,
        request.class_index,
        0,
    )


def decode_request(data: bytes) -> Request:
    """Raises WireError."""
    if len(data) != REQUEST_BYTES:
        raise WireError(f"request: got {len(data)} bytes, expected {REQUEST_BYTES}")
    magic, flow, size, priority, dscp, class_index, _ = _REQUEST.unpack(data)
    if magic != _MAGIC:
        raise WireError(f"request magic: got {magic!r}, expected {_MAGIC!r}")
    if not 1 <= size <= MAX_SIZE_BYTES:
        raise WireError(f"request size: got {size}, expected 1 to {MAX_SIZE_BYTES} bytes")
    if dscp > 63:
        raise WireError(f"request dscp: got {dscp}, expected 0 to 63")
    return Request(flow, size, priority, dscp, class_index)
