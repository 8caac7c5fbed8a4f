"""One daemon as a process whose descriptors outlive it, and its code as a directory to replace."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from intentd.daemons.kit.admin import AdminClient
from intentd.daemons.kit.config import admin_path
from intentd.daemons.kit.holder import FdHolder

ROOT: Final = Path(__file__).parents[1]
CODE: Final = ("agent", "controller", "core", "daemons", "proxy", "testbed", "src")
MODULES: Final = {
    "agent": "intentd.agent.daemon",
    "controller": "intentd.controller.daemon",
    "gpu": "intentd.daemons.gpu.daemon",
    "proxy": "intentd.proxy.daemon",
    "sequencer": "intentd.daemons.sequencer.daemon",
}
WAIT_S: Final = 120.0


class Service:
    """A daemon under a manager that holds its descriptors, as systemd or ``intentctl up`` does.

    base: a directory of its own. code: where its code is; ``upgrade`` replaces it.
    """

    def __init__(self, base: Path, role: str, config: str, *, code: Path = ROOT) -> None:
        self.base = base
        self.role = role
        self.code = code
        self.log_path = base / f"{role}.log"
        self.config = base / f"{role}.toml"
        base.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'state_dir = "{base}/state-{role}"\nrun_dir = "{base}/run"\n{config}'
        )
        (base / "run").mkdir(exist_ok=True)
        self.holder = FdHolder(base / "run" / f"{role}.notify", on_notice=self._heard)
        self.process: subprocess.Popen[bytes] | None = None
        self._ready = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.holder.socket.fileno(), self.holder.receive)

    def _heard(self, notice: dict[str, str]) -> None:
        pid = str(self.process.pid) if self.process is not None else ""
        if notice.get("READY") == "1" and notice.get("MAINPID") == pid:
            self._ready.set()

    @property
    def admin(self) -> AdminClient:
        return AdminClient(admin_path(self.role, self.base / "run"), WAIT_S)

    async def start(self) -> None:
        """Start, and wait until it says that it runs."""
        self._ready.clear()
        program = (
            f"from intentd.daemons.kit.held import inherit; inherit({self.holder.fds!r})\n"
            f"import sys; from {MODULES[self.role]} import main; sys.exit(main())"
        )
        environment = {**os.environ, "PYTHONPATH": str(self.code / "src")}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1"} | self.holder.environment()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220  pass_fds, and a moment
                [sys.executable, "-c", program, "--config", str(self.config)],
                env=environment,
                stderr=log,
                pass_fds=self.holder.fds,
            )
        ready = asyncio.ensure_future(self._ready.wait())
        try:
            async with asyncio.timeout(WAIT_S):
                while not ready.done():
                    await asyncio.wait({ready}, timeout=0.1)
                    if self.process.poll() is not None:
                        raise RuntimeError(f"{self.role} ended:\n{self.log_path.read_text()}")
        finally:
            ready.cancel()

    async def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None, "start comes first"
        self.process.terminate()
        return await self._ended()

    async def _ended(self) -> int:
        assert self.process is not None, "start comes first"
        async with asyncio.timeout(WAIT_S):
            while self.process.poll() is None:  # noqa: ASYNC110  no event for it
                await asyncio.sleep(0.02)
        self.holder.receive()
        return int(self.process.returncode)

    async def restart(self, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Stop, call between, start. How long it took to stop and to be ready again."""
        began = time.monotonic()
        code = await self.stop()
        if code != 0:
            raise RuntimeError(f"{self.role} ended with {code}:\n{self.log_path.read_text()}")
        stopped = time.monotonic()
        between()
        await self.start()
        return {
            "stop_s": round(stopped - began, 3),
            "start_s": round(time.monotonic() - stopped, 3),
        }

    async def status(self) -> dict[str, Any]:
        return await self.admin.acall("status")

    def close(self) -> None:
        """End the process if it runs, and let go of what is held."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        asyncio.get_running_loop().remove_reader(self.holder.socket.fileno())
        self.holder.close()


def copy_code(target: Path, version: str) -> Path:
    """The project's code in a directory of its own, which says that it is version."""
    target.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in CODE:
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    init = target / "src" / "intentd" / "__init__.py"
    text, count = re.subn(r'__version__ = ".*"', f'__version__ = "{version}"', init.read_text())
    if count != 1:
        raise RuntimeError(f"{init}: no version found")
    init.write_text(text)
    return target


def replace_code(installed: Path, other: Path) -> None:
    """As a package manager does: the old directory away, the new one in its place."""
    installed.rename(installed.with_name(f"{installed.name}-old"))
    other.rename(installed)
    shutil.rmtree(installed.with_name(f"{installed.name}-old"))
