"""intentd-proxy as a process of a benchmark: its files in one directory, its books by admin."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ProxyProcess:
    """models: (name, base_url, further TOML lines) each. extra: TOML tables."""

    def __init__(self, base: Path, models: list[tuple[str, str, str]], extra: str = "") -> None:
        base.mkdir(parents=True, exist_ok=True)
        self.base = base
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        tables = "".join(
            f'[[models]]\nname = "{name}"\nbase_url = "{url}"\n{more}\n'
            for name, url, more in models
        )
        (base / "proxy.toml").write_text(
            f'name = "{base.name}"\nstate_dir = "{base}/state"\nrun_dir = "{base}/run"\n'
            "[controller]\nenabled = false\n[status]\nenabled = false\n"
            '[listen]\nbind = "127.0.0.1:0"\nmax_requests = 20000\n'
            f'[log]\nlevel = "warning"\n{extra}\n{tables}'
        )

    async def start(self) -> None:
        process = self.process = self._spawn()
        async with asyncio.timeout(120):
            while True:
                try:
                    self.url = "http://" + (await self.admin("status"))["detail"]["api"]
                except (OSError, KeyError, ValueError):
                    if process.poll() is not None:
                        raise RuntimeError((self.base / "log").read_text()[-3000:]) from None
                    await asyncio.sleep(0.05)
                else:
                    return

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "intentd.proxy.daemon"]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        with (self.base / "log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--config", str(self.base / "proxy.toml")], env=env, stderr=log
            )

    async def admin(self, command: str, **args: Any) -> Any:
        reader, writer = await asyncio.open_unix_connection(
            str(self.base / "run" / "proxy.admin.sock"), limit=64 << 20
        )
        try:
            writer.write(json.dumps({"command": command, "args": args}).encode() + b"\n")
            answer = json.loads(await reader.readline())
        finally:
            writer.close()
        if not answer["ok"]:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
