"""Runs the suite's daemons as children: start in order, restart with backoff, record, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypedDict

from intentd.core.errors import IntentdError
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.config import admin_path
from intentd.daemons.kit.files import prepare_directory, write_atomically
from intentd.daemons.kit.holder import FdHolder
from intentd.daemons.kit.keys import new_fin_key, write_fin_key
from intentd.daemons.kit.starting import EXIT_USAGE
from intentd.daemons.kit.tokens import new_secret, token_hash

BACKOFF_MIN_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
STEADY_S: Final = 60.0  # alive this long: the next death starts a fresh backoff
STOP_TIMEOUT_S: Final = 20.0
POLL_S: Final = 0.1


class Child(TypedDict):
    """A process that is still the same one: the id alone may be another's by now."""

    pid: int
    start: str


@dataclass(frozen=True)
class Layout:
    """Where one suite keeps its things, and which ports it takes from port_base on.

    live: a light load runs beside it. small_model: a program that serves a model at --port.
    """

    run_dir: Path
    state_dir: Path
    config_dir: Path | None
    port_base: int
    live: bool = False
    small_model: Path | None = None

    @property
    def record(self) -> Path:
        return self.run_dir / "up.json"

    @property
    def log(self) -> Path:
        return self.state_dir / "up.log"

    @property
    def fin_key(self) -> Path:
        return self.state_dir / "fin.key"

    @property
    def proxy_url(self) -> str:
        return f"http://127.0.0.1:{self.port_base + _PROXY_OFFSET}"

    def companions(self) -> dict[str, list[str]]:
        """name -> command of what runs beside the daemons."""
        found = {}
        if self.small_model is not None:
            port = str(self.port_base + _SMALL_MODEL_OFFSET)
            found["model"] = [sys.executable, str(self.small_model), "--port", port]
        if self.live:
            found["live"] = [sys.executable, "-m", "intentd.testbed.live",
                             f"--socket={self.run_dir / 'agent.sock'}",
                             f"--gpu={admin_path('gpu', self.run_dir)}"]  # fmt: skip
            if self.small_model is not None:
                found["live"].append(f"--proxy={self.proxy_url}")
        return found

    @property
    def token_file(self) -> Path:
        return self.state_dir / "console.token"

    def prepare(self) -> None:
        """Make the directories, the key of this suite's FIN datagrams, and a token for the
        console."""
        prepare_directory(self.run_dir, 0o755)
        prepare_directory(self.state_dir, 0o700)
        if not self.fin_key.exists():
            write_fin_key(self.fin_key, new_fin_key())
        if not self.token_file.exists():
            write_atomically(self.token_file, f"{new_secret()}\n".encode())

    def way_in(self) -> str:
        """Where the console's token lies; "" when the operator's file says who is let in."""
        return str(self.token_file) if self.config_of("controller") is None else ""

    def config_of(self, role: str) -> Path | None:
        path = self.config_dir / f"{role}.toml" if self.config_dir is not None else None
        return path if path is not None and path.exists() else None

    def environment(self, role: str) -> dict[str, str]:
        """Overrides that make the embedded defaults of one role fit together."""
        base = self.port_base
        own = {
            "STATE_DIR": str(self.state_dir / role),
            "RUN_DIR": str(self.run_dir),
            "STATUS__BIND": f"127.0.0.1:{base + _STATUS_OFFSET[role]}",
            **_endpoints(role, base, self.fin_key),
        }
        if role == "proxy" and self.small_model is not None:
            own["MODELS"] = _models(base + _SMALL_MODEL_OFFSET)
        if role == "controller":
            token = self.token_file.read_text(encoding="ascii").strip()
            own["STATUS__TOKENS"] = f'["admin:{token_hash(token)}"]'
        if self.config_of(role) is not None:  # the operator's file says the rest
            own = {name: own[name] for name in ("STATE_DIR", "RUN_DIR")}
        return {f"INTENTD_{role.upper()}__{name}": value for name, value in own.items()}


_STATUS_OFFSET: Final = {"controller": 1, "sequencer": 11, "agent": 21, "gpu": 41, "proxy": 51}
_PROXY_OFFSET: Final = 50
_SMALL_MODEL_OFFSET: Final = 60
# one small model under two names with two prices, so that there is a choice to make
_SMALL_MODELS: Final = (("small", "0.15", "0.60"), ("large", "5", "20"))


def _endpoints(role: str, base: int, fin_key: Path) -> dict[str, str]:
    """How they find each other on the loopback; each core of the machine is taken for a GPU."""
    hub, turns = f"tcp://127.0.0.1:{base}", f"tcp://127.0.0.1:{base + 10}"
    if role == "controller":
        return {"HUB__BIND": hub}
    if role == "gpu":
        nodes = f'[{{name = "local", gpus = {os.cpu_count() or 1}}}]'
        return {"CONTROLLER__ENDPOINT": hub, "JOBS__NODES": nodes}
    if role == "proxy":
        bind = f"127.0.0.1:{base + _PROXY_OFFSET}"
        return {"CONTROLLER__ENDPOINT": hub, "LISTEN__BIND": bind}
    own = {"CONTROLLER__ENDPOINT": hub, "FIN__KEY_FILE": str(fin_key)}
    hears = f"127.0.0.1:{base + 12}"
    if role == "sequencer":
        return own | {"TURNS__BIND": turns, "FIN__BIND": hears}
    order = f'{{endpoint = "{turns}", fin_addresses = ["{hears}"]}}'
    domain = f'{{name = "default", default = true, sequencer = {order}}}'
    return own | {"FIN__BIND": f"127.0.0.1:{base + 30}", "DOMAINS": f"[{domain}]"}


def _models(port: int) -> str:
    """The pool of a proxy in front of the small model, in TOML."""
    rows = [
        f'{{name = "{name}", upstream_model = "smollm2-135m", window = 2048, '
        f'base_url = "http://127.0.0.1:{port}/v1", max_output_tokens = 64, '
        f'price_in = "{price_in}", price_out = "{price_out}"}}'
        for name, price_in, price_out in _SMALL_MODELS
    ]
    return f"[{', '.join(rows)}]"


def identify(pid: int) -> Child:
    """The process as it is now. Raises ProcessLookupError."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        raise ProcessLookupError(pid) from None
    fields = stat.rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return {"pid": pid, "start": fields[19]}  # field 22 of proc(5): ticks since boot


def alive(child: Child) -> bool:
    try:
        return identify(child["pid"])["start"] == child["start"]
    except ProcessLookupError:
        return False


def read_record(path: Path) -> dict[str, Any] | None:
    """What ``up`` wrote; None when there is none or it is not ours to act on."""
    try:
        if path.stat().st_uid not in (0, os.geteuid()):
            return None
        record = json.loads(path.read_text())
        children = [record["supervisor"], *record.get("children", {}).values()]
        if not all(type(c["pid"]) is int and c["pid"] > 1 and c["start"] for c in children):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(record)


class Supervisor:
    """Keeps one child a role alive. log: where their lines go, each with its role in front."""

    def __init__(
        self,
        layout: Layout,
        roles: Sequence[str],
        modules: Mapping[str, str],
        log: IO[str],
    ) -> None:
        self.layout = layout
        self._roles = tuple(roles)
        self._modules = modules
        self._log = log
        self._companions = layout.companions()
        self._all_ready = asyncio.Event()
        self._tails: dict[str, deque[str]] = {
            name: deque(maxlen=3) for name in (*roles, *self._companions)
        }
        self._holders: dict[str, FdHolder] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._children: dict[str, Child] = {}
        self._failed: asyncio.Future[None] | None = None
        self._addresses: dict[str, str] = {}
        self._ready = False

    async def run(self) -> None:
        """Until cancelled."""
        self.layout.prepare()
        self._failed = asyncio.get_running_loop().create_future()
        self._record()
        for role in self._roles:
            self._holders[role] = holder = FdHolder(self.layout.run_dir / f"{role}.notify.sock")
            asyncio.get_running_loop().add_reader(holder.socket.fileno(), holder.receive)
        async with asyncio.TaskGroup() as tasks:
            for role in self._roles:
                tasks.create_task(self._keep(role), name=f"keep-{role}")
            for name, command in self._companions.items():
                tasks.create_task(self._keep_beside(name, command), name=f"keep-{name}")

    async def ready(self, timeout_s: float) -> None:
        """Wait until all are ready. Raises IntentdError when one cannot start, or in time."""
        waiting = list(self._roles)
        try:
            async with asyncio.timeout(timeout_s):
                while waiting:
                    if self._failed is not None and self._failed.done():
                        self._failed.result()
                    if await self._is_ready(waiting[0]):
                        waiting.pop(0)
                    else:
                        await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise IntentdError(f"{', '.join(waiting)}: not ready after {timeout_s:.0f} s") from None
        self._ready = True
        self._all_ready.set()
        self._record()

    async def _is_ready(self, role: str) -> bool:
        client = AdminClient(admin_path(role, self.layout.run_dir), 5.0)
        try:
            status = await client.acall("status")
        except (AdminUnreachableError, AdminRefusedError):
            return False
        process = self._processes.get(role)
        if process is None or status["pid"] != process.pid:
            return False
        self._addresses[role] = status["status_address"]
        connected = status["controller"] is None or status["controller"]["connected"]
        return bool(status["ready"] and connected)

    def processes(self) -> dict[str, int]:
        """role -> process id, of those that run."""
        return {r: p.pid for r, p in self._processes.items() if p.returncode is None}

    def addresses(self) -> dict[str, str]:
        return dict(self._addresses)

    async def _keep(self, role: str) -> None:
        loop = asyncio.get_running_loop()
        wait_s = BACKOFF_MIN_S
        while True:
            began = loop.time()
            process = await self._start(role)
            await self._copy_log(role, process)
            code = await process.wait()
            self._say(role, f"ended with status {code}")
            if self._failed is not None and not self._failed.done():
                never_ran = not self._ready
                if code == EXIT_USAGE or never_ran:
                    self._failed.set_exception(
                        IntentdError(
                            f"{role} ended with status {code} at start: "
                            + " | ".join(self._tails[role])
                        )
                    )
                    return
            if code == 0:  # asked to, by ``intentctl restart``: what waits, waits in the kernel
                wait_s = BACKOFF_MIN_S
                continue
            if loop.time() - began > STEADY_S:
                wait_s = BACKOFF_MIN_S
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, BACKOFF_MAX_S)

    async def _keep_beside(self, name: str, command: Sequence[str]) -> None:
        """A companion: it begins when the daemons are ready, and may fail without harm."""
        await self._all_ready.wait()
        wait_s = BACKOFF_MIN_S
        while True:
            process = await self._spawn(name, command, dict(os.environ))
            await self._copy_log(name, process)
            self._say(name, f"ended with status {await process.wait()}")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, BACKOFF_MAX_S)

    async def _start(self, role: str) -> asyncio.subprocess.Process:
        holder = self._holders[role]
        holder.receive()  # what the one before said last
        code = (
            f"from intentd.daemons.kit.held import inherit; inherit({holder.fds!r})\n"
            f"import sys; from {self._modules[role]} import main; sys.exit(main())"
        )
        command = [sys.executable, "-c", code]
        config = self.layout.config_of(role)
        if config is not None:
            command += ["--config", str(config)]
        environment = {**self.layout.environment(role), **holder.environment()}
        return await self._spawn(role, command, {**os.environ, **environment}, holder.fds)

    async def _spawn(
        self, role: str, command: Sequence[str], env: Mapping[str, str], fds: Sequence[int] = ()
    ) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=env,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; we tell the children
        )
        self._processes[role] = process
        with contextlib.suppress(ProcessLookupError):
            self._children[role] = identify(process.pid)
        self._record()
        return process

    async def _copy_log(self, role: str, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # longer than the reader's limit
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip("\n")
            self._tails[role].append(text)
            self._say(role, text)

    def _let_go(self, role: str) -> None:
        """Nobody will take up what a role handed over."""
        holder = self._holders.pop(role, None)
        if holder is not None:
            asyncio.get_running_loop().remove_reader(holder.socket.fileno())
            holder.close()

    def _say(self, role: str, text: str) -> None:
        print(f"{role:<10} | {text}", file=self._log, flush=True)

    def _record(self) -> None:
        document = {
            "supervisor": identify(os.getpid()),
            "children": self._children,
            "ready": self._ready,
            "addresses": self._addresses,
            "status_address": self._addresses.get("controller", ""),
        }
        write_atomically(self.layout.record, json.dumps(document).encode(), mode=0o644)

    async def stop(self) -> None:
        """Stop the children, last started first; those that take too long are killed."""
        for role in (*self._companions, *reversed(self._roles)):
            process = self._processes.get(role)
            if process is None or process.returncode is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._copy_log(role, process)
                    await process.wait()
            except TimeoutError:
                self._say(role, "did not stop: killed")
                process.kill()
                await process.wait()
            self._let_go(role)
        for role in list(self._holders):
            self._let_go(role)
        self.layout.record.unlink(missing_ok=True)
