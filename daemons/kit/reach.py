"""Whether anybody listens at an address, for libraries that try for minutes before they say so."""

from __future__ import annotations

import re
import socket
from typing import Final

_HOST_PORT: Final = re.compile(r"(?:[a-z]+://)?(?:\[([^]]+)\]|([^:/\[\]]+)):(\d{1,5})")
PATIENCE_S: Final = 3.0


def require_listener(address: str, patience_s: float = PATIENCE_S) -> None:
    """Blocking. Raises OSError if nobody takes a connection at host:port. An address of another
    form (``auto``) is not looked at."""
    found = _HOST_PORT.fullmatch(address)
    if found is None:
        return
    host, port = found[1] or found[2], int(found[3])
    try:
        if port > 65535:
            raise OSError("no such port")
        socket.create_connection((host, port), patience_s).close()
    except OSError as error:
        late = isinstance(error, TimeoutError)
        reason = f"no answer in {patience_s:g} s" if late else error.strerror or str(error)
        raise ConnectionError(reason) from None
