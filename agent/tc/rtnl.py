"""pyroute2's route socket, and no more of pyroute2 than it needs.

``import pyroute2`` runs a package file that imports every subsystem (NDB, nftables, wireguard...):
11 MB in a process that already has asyncio, aiohttp and pydantic; the route socket alone costs 5
(measured: PSS from /proc/self/smaps_rollup, 0.9.7). The agent has 60 MB in all, so the package
file is stepped over: a bare package of the same path stands in while the route socket is imported
and is taken out again. A later ``import pyroute2`` then does its usual work.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
import types
from typing import Any, Final

PACKAGE: Final = "pyroute2"
_import_lock = threading.Lock()


def _import_slim() -> types.ModuleType:
    with _import_lock:
        loaded = sys.modules.get(f"{PACKAGE}.iproute.linux")
        if loaded is not None:
            return loaded
        if PACKAGE in sys.modules:
            return importlib.import_module(f"{PACKAGE}.iproute.linux")
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None:
            raise ModuleNotFoundError("pyroute2 is not installed (pip install 'intentd[agent]')")
        shell = types.ModuleType(PACKAGE)
        shell.__path__ = list(spec.submodule_search_locations or ())
        shell.__spec__ = spec
        sys.modules[PACKAGE] = shell
        try:
            return importlib.import_module(f"{PACKAGE}.iproute.linux")
        finally:
            del sys.modules[PACKAGE]


class RouteSocket:
    """A route netlink socket for one thread that runs no event loop.

    pyroute2 0.9 drives an asyncio loop inside. That loop has to be the selector's: under a uvloop
    policy the library would make itself a uvloop, which refuses netlink ("invalid family 16").
    """

    def __init__(self) -> None:
        self._loop = asyncio.SelectorEventLoop()
        try:
            # groups=0: no broadcasts of link and address changes into a queue nobody reads
            self.ip: Any = _import_slim().IPRoute(use_event_loop=self._loop, groups=0)
        except BaseException:
            self._loop.close()
            raise

    def close(self) -> None:
        self.ip.close()
        if not self._loop.is_closed():
            # the transport's own close callback needs one more turn of the loop
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def error_code(error: BaseException) -> int | None:
    """The errno a netlink request was refused with, None if the error is not a refusal."""
    code = getattr(error, "code", None)
    if type(error).__name__.startswith("Netlink") and isinstance(code, int):
        return code
    return None
