"""A Ray cluster of this host, with GPUs that may be simulated: the head and nodes in one unit.

    python -m intentd.daemons.gpu.ray_cluster DIRECTORY '{"nodes": {"a": 2}, ...}'
    python -m intentd.daemons.gpu.ray_cluster --stop DIRECTORY

Runs until SIGTERM, then ends all it started. A node that ends is started again, as a service
manager would, the head before the others. ``DIRECTORY/cluster.json`` says the address and who runs
it; nothing else of Ray on this host is touched (``ray stop`` would end everybody's). Standard
library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1
AGAIN_S: Final = 1.0
END_S: Final = 3.0  # Ray would drain for as long as actors live, which ours do
START_S: Final = 300.0  # on a busy host; one that fails ends before
STARTED: Final = b"Ray runtime started"
FILE: Final = "cluster.json"
# Ray's own metrics, usage reports and workers started in advance cost seconds and 200 MB. Workers
# that take a minute to start it ends and begins anew: on a busy host slots would never be there
SYSTEM: Final = {"enable_metrics_collection": False, "worker_register_timeout_seconds": 300}
QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_open_telemetry": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # jobs inherit it; Ray's own default is 15
}


def start_ticks(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(text.rpartition(")")[2].split()[19])


def _gcs_of(pid: int) -> int:
    """The process of a head that knows of everything; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text() == "gcs_server\n":
                return int(child)
    return 0


def _lives(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def running(directory: Path) -> dict[str, Any] | None:
    """What ``cluster.json`` says, if its process lives."""
    try:
        said: dict[str, Any] = json.loads((directory / FILE).read_text(encoding="utf-8"))
        alive = start_ticks(int(said["pid"])) == said["start_ticks"]
    except (OSError, ValueError, KeyError):
        return None
    return said if alive else None


def token(directory: Path) -> dict[str, str]:
    """Environment with which Ray's processes prove to be of this cluster: its ports are open to
    the network, and whoever may connect may run programs."""
    path = directory / "token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


class LocalCluster:
    """nodes: name -> GPUs. The head has no GPUs unless there is one node alone."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.nodes: dict[str, int] = settings["nodes"]
        self.temp = Path(settings["temp_dir"])
        self.object_store_bytes = int(settings["object_store_bytes"])
        self.port = self._port()
        self.temp.mkdir(mode=0o700, exist_ok=True)
        if self.temp.stat().st_uid != os.geteuid():
            raise SystemExit(f"{self.temp}: belongs to another user")
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, float] = {}
        self._over = False
        self._gcs = 0
        self._alone = len(self.nodes) == 1

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def run(self) -> None:
        """Until a signal says to end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        me = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid())}
        temporary = self.directory / f".{FILE}"
        said = {"address": self.address, "temp_dir": str(self.temp), **me}
        temporary.write_text(json.dumps(said), encoding="utf-8")
        try:
            self._start("", None)
            if self._running[""].poll() is not None:
                raise SystemExit(f"the Ray head did not start: see {self.directory}/ray-head.log")
            temporary.replace(self.directory / FILE)
            for name, gpus in self.nodes.items():
                if not self._alone:
                    self._start(name, gpus)
            while not self._over:
                self._restart()
                time.sleep(0.2)
        finally:
            self._end_all()
            with contextlib.suppress(OSError):
                (self.directory / FILE).unlink()

    # -- inside --------------------------------------------------------------------------------

    def _end(self, *_: object) -> None:
        self._over = True

    def _port(self) -> int:
        """The same one as last time, so that nodes and drivers find the head again."""
        path = self.directory / "port"
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        path.write_text(str(port))
        return port

    def _start(self, name: str, gpus: int | None) -> None:
        """One node; the head if it has no name."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--disable-usage-stats", "--include-log-monitor=false"]
        command += [f"--object-store-memory={self.object_store_bytes}"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        if gpus is None:
            own, own_gpus = next(iter(self.nodes.items())) if self._alone else ("head", 0)
            command += ["--head", f"--port={self.port}", f"--temp-dir={self.temp}"]
            command += ["--include-dashboard=false", f"--system-config={json.dumps(SYSTEM)}"]
            command += ["--no-monitor", f"--node-name={own}"]
            command += [f"--num-gpus={own_gpus}", f"--num-cpus={4 if own_gpus else 0}"]
        else:
            command += [f"--address={self.address}", f"--node-name={name}"]
            command += [f"--num-gpus={gpus}", "--num-cpus=4"]
        parent = os.getpid()

        def die_with_me() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        path = self.directory / f"ray-{name or 'head'}.log"
        with path.open("wb") as log:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **QUIET, **token(self.directory)},
                preexec_fn=die_with_me,  # noqa: PLW1509  no other thread exists here
            )
        # one after the other: two that start at once take the same socket names
        for _ in range(int(START_S / 0.1)):
            if STARTED in path.read_bytes() or self._over or self._running[name].poll() is not None:
                if not name:
                    self._gcs = _gcs_of(self._running[name].pid)
                return
            if name and self._headless():  # it would wait a minute or two for one, and all for it
                self._kill(name)
                return
            time.sleep(0.1)

    def _headless(self) -> bool:
        """The head ends for most of a minute once its core is gone, and the others look for it as
        long: nothing of the cluster comes back from that."""
        return self._running[""].poll() is not None or (self._gcs > 0 and not _lives(self._gcs))

    def _kill(self, name: str) -> None:
        """With all it started."""
        process = self._running[name]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _restart(self) -> None:
        if self._headless() and any(p.poll() is None for p in self._running.values()):
            for name in reversed(self._running):
                self._kill(name)
        now = time.monotonic()
        for name, process in list(self._running.items()):
            if process.poll() is None:
                continue
            if name not in self._ended:
                self._ended[name] = now
                self._kill(name)  # what it started may outlive it, and hold its port
            if name and self._headless():
                continue
            if now - self._ended[name] >= AGAIN_S and not self._over:
                self._ended.pop(name)
                self._start(name, self.nodes.get(name) if name else None)

    def _end_all(self) -> None:
        """Nodes first; whoever does not go is killed with all it started."""
        for process in reversed(list(self._running.values())):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        until = time.monotonic() + END_S
        for name, process in self._running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))
            self._kill(name)
        shutil.rmtree(self.temp, ignore_errors=True)


def stop(directory: Path) -> bool:
    """Ends a cluster; whether there was one."""
    known = running(directory)
    if known is None:
        return False
    os.kill(known["pid"], signal.SIGTERM)
    for _ in range(int(10 * (END_S + 5))):
        if running(directory) is None:
            return True
        time.sleep(0.1)
    return False


def main() -> int:
    if sys.argv[1] == "--stop":
        return 0 if stop(Path(sys.argv[2])) else 1
    directory = Path(sys.argv[1])
    if running(directory) is not None:
        return 0
    LocalCluster(directory, json.loads(sys.argv[2])).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
