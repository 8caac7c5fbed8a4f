"""Where a campaign happens: namespaces, relays, PostgreSQL and the members, from files of theirs.

Every member's way to every other one passes a relay of its own (``relay``), so that any single link
can be frozen, delayed or cut; the hosts' own devices can be taken down beside. A member's state
lives on a small file system of its own that can be filled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.chaos.members import Member, Patience, build_clock
from benchmarks.chaos.relay import TcpLink, UdpLink
from benchmarks.local_postgres import Postgres
from intentd.daemons.gpu import ray_cluster
from intentd.daemons.kit.keys import new_curve_keys, new_fin_key, write_curve_keys, write_fin_key
from intentd.testbed import netns
from intentd.testbed.toml import to_toml

PREFIX: Final = "ichaos"
DOMAIN: Final = "uplinks"
RATE_BPS: Final = 200e6
MAX_WAIT_S: Final = 5.0
GPUS: Final = 4
CAP_TOKENS: Final = 20
PRICE_IN_NANO, PRICE_OUT_NANO = 1_000, 1_000_000  # a token: $1 and $1,000 a million
MEMBERS: Final = (
    ("controller", "c"), ("sequencer", "s"), ("agent", "h1"), ("agent", "h2"),
    ("gpu", "g"), ("proxy", "p1"), ("proxy", "p2"),
)  # fmt: skip
RAY: Final = "r"
RAY_GPUS: Final = 2
OTHERS: Final = ("relay", "db", "provider", "users", "sink")
STATE_BYTES: Final = 48 << 20
_HUB, _TURNS, _FIN, _API = 7400, 7410, 7430, 7450
_STALE: Final = re.compile(r"ichaos-([0-9]+)-")


@dataclass(eq=False)
class World:
    """Enter it, ``start``, and leave it: nothing stays behind, also after a failure.

    settings: by role, tables laid over those of the members' files. ray: a second GPU scheduler, r,
    over a Ray cluster of its own in its namespace.
    """

    logs: Path
    seed: int
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    ray: bool = False
    clock: Patience = field(default_factory=Patience)
    members: list[Member] = field(default_factory=list)
    tcp: dict[str, TcpLink] = field(default_factory=dict)
    fins: UdpLink | None = None
    spaces: dict[str, netns.Namespace] = field(default_factory=dict)
    found_qdiscs: dict[str, str] = field(default_factory=dict)
    provider_targets: dict[str, tuple[str, int]] = field(default_factory=dict)
    postgres: Postgres | None = None
    root: Path = Path()
    _net: netns.Topology | None = None
    _mounts: list[Path] = field(default_factory=list)
    _keepers: list[asyncio.Task[None]] = field(default_factory=list)
    _ports: int = 20_000

    # -- building -------------------------------------------------------------------------------

    def build(self) -> None:
        """Namespaces, the database, directories, keys and files; nothing of ours runs yet."""
        remove_stale()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-", dir="/tmp"))
        self.root.chmod(0o711)  # the database runs as another user
        self._net = netns.Topology(PREFIX)
        wanted = (*MEMBERS, *((("gpu", RAY),) if self.ray else ()))
        names = [name for _, name in wanted] + list(OTHERS)
        for name in names:
            self.spaces[name] = self._net.namespace(name)
        self._net.star([self.spaces[name] for name in names])
        clock = build_clock(self.root)
        for role, name in wanted:
            self._add(role, name, "" if name == RAY else clock)
        for name in ("h1", "h2"):
            self.found_qdiscs[name] = self.qdiscs(name)
        self.postgres = Postgres(base=self._disk(self.root / "pg", 400 << 20))

    def _add(self, role: str, name: str, clock: str) -> None:
        base = self.root / f"{role}-{name}"
        base.mkdir()
        member = Member(
            role, name, self.spaces[name], base, self.logs / f"{role}-{name}.log", clock=clock
        )
        self._disk(member.state_dir, STATE_BYTES)
        member.state_dir.chmod(0o700)
        self.members.append(member)
        write_curve_keys(self._key(member.label), new_curve_keys())

    def _disk(self, where: Path, size_bytes: int) -> Path:
        """A file system of its own, as small as said."""
        where.mkdir(mode=0o755)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", f"{PREFIX}-state", where],
            check=True, timeout=20,
        )  # fmt: skip
        self._mounts.append(where)
        return where

    def _key(self, name: str) -> Path:
        return self.root / f"{name}.key"

    def _public(self, label: str) -> Path:
        return self.root / f"{label}.key.pub"

    def ip(self, name: str) -> str:
        return self.spaces[name].interfaces["eth0"].ipv4

    async def link(self, who: str, whom: str, target: tuple[str, int] | str) -> tuple[str, int]:
        """A relay of its own from who to whom; where who finds it."""
        self._ports += 1
        made = TcpLink(f"{who}>{whom}", self.spaces["relay"], self.ip("relay"), self._ports, target)
        await made.start()
        self.tcp[made.name] = made
        return made.address, made.port

    # -- configuration --------------------------------------------------------------------------

    async def configure(self) -> None:
        """Relays and files. Needs provider_targets: name -> where it listens."""
        assert self.postgres is not None
        write_fin_key(self.root / "fin.key", new_fin_key())
        hears = [(self.ip(name), _FIN) for name in ("s", "h1", "h2")]
        rng = random.Random(f"{self.seed}/fins")
        self.fins = UdpLink("fins", self.spaces["relay"], self.ip("relay"), _FIN, hears, rng)
        await self.fins.start()
        makers: dict[str, Callable[[Member], Any]] = {
            "controller": self._controller, "sequencer": self._sequencer, "agent": self._agent,
            "gpu": self._gpu, "proxy": self._proxy,
        }  # fmt: skip
        for member in self.members:
            own = await makers[member.role](member)
            common = {
                "name": member.name, "host": member.name, "state_dir": member.state_dir,
                "run_dir": member.run_dir, "drain_timeout_s": 2.0,
                "status": {"bind": "127.0.0.1:0"},
            }  # fmt: skip
            for table, values in self.settings.get(member.role, {}).items():
                own[table] = own.get(table, {}) | dict(values)
            member.config.write_text(to_toml(common | own))
        lines = [
            self._public(member.label).read_text().strip()
            for member in self.members
            if member.role != "controller"
        ]
        (self.root / "allow").write_text("\n".join(lines) + "\n")

    async def _controller(self, member: Member) -> dict[str, Any]:
        return {
            "hub": {
                "bind": f"tcp://{self.ip(member.name)}:{_HUB}",
                "key_file": self._key(member.label),
                "allow_file": self.root / "allow",
                "report_interval_s": 1.0,
            },
            "flows": {
                "policy": "2d",
                "thresholds_interval_s": 3.0,
                "rates_interval_s": 3.0,
                "default_rate": RATE_BPS,
                "domains": [{"domain": DOMAIN, "sequencing": "global", "max_wait": MAX_WAIT_S}],
            },
            "jobs": {"search": False},
        }

    async def _up(self, member: Member) -> dict[str, Any]:
        address, port = await self.link(member.name, "c", (self.ip("c"), _HUB))
        return {
            "endpoint": f"tcp://{address}:{port}",
            "key_file": self._key(member.label),
            "server_key_file": self._public("controller-c"),
            "backoff_max_s": 1.0,
        }

    async def _sequencer(self, member: Member) -> dict[str, Any]:
        return {
            "turns": {
                "bind": f"tcp://{self.ip(member.name)}:{_TURNS}",
                "key_file": self._key(member.label),
                "allow_file": self.root / "allow",
            },
            "fin": {"bind": f"0.0.0.0:{_FIN}", "key_file": self.root / "fin.key"},
            "controller": await self._up(member),
        }

    async def _agent(self, member: Member) -> dict[str, Any]:
        address, port = await self.link(member.name, "s", (self.ip("s"), _TURNS))
        domain = {
            "name": DOMAIN, "default": True, "rate_bps": RATE_BPS, "device": "eth0",
            "sequencer": {
                "endpoint": f"tcp://{address}:{port}",
                "key_file": self._key(member.label),
                "server_key_file": self._public("sequencer-s"),
                "fin_addresses": [f"{self.ip('relay')}:{_FIN}"],
            },
        }  # fmt: skip
        return {
            "controller": await self._up(member),
            "fin": {"bind": f"0.0.0.0:{_FIN}", "key_file": self.root / "fin.key"},
            "domains": [domain],
            "tc_verify_interval_s": 2.0,
        }

    async def _gpu(self, member: Member) -> dict[str, Any]:
        each = 1 if member.name == RAY else GPUS // 2
        nodes = [{"name": name, "gpus": each} for name in ("a", "b")]
        own: dict[str, Any] = {
            "controller": await self._up(member),
            "jobs": {"nodes": nodes, "policy": "maxmin"},
            "costs": {"hold_growth_s": 2.0},
        }
        if member.name == RAY:
            own["jobs"]["executor"] = "ray"
            own["ray"] = {"lease_s": 5.0, "lost_after_s": 8.0}
        return own

    async def _proxy(self, member: Member) -> dict[str, Any]:
        assert self.postgres is not None
        address, port = await self.link(
            member.name, "db", str(self.postgres.base / ".s.PGSQL.5432")
        )
        models = []
        for name, target in self.provider_targets.items():
            away, there = await self.link(member.name, name, target)
            models.append(
                {
                    "name": name, "base_url": f"http://{away}:{there}/v1", "price_in": "1",
                    "price_out": "1000", "max_output_tokens": CAP_TOKENS,
                    "fallbacks": [other for other in self.provider_targets if other != name],
                }
            )  # fmt: skip
        return {
            "controller": await self._up(member),
            "listen": {"bind": f"{self.ip(member.name)}:{_API}"},
            "keys": {"required": True},
            "models": models,
            "upstream": {
                "first_token_timeout_s": 4.0, "idle_timeout_s": 3.0, "total_timeout_s": 15.0,
                "cooldown_s": 1.0,
            },
            "conversations": {"wait_s": 20.0},
            "store": {
                "url": f"postgresql://intentd@{address}:{port}/postgres?sslmode=disable",
                "timeout_s": 5.0,
                "lease_s": 4.0,
            },
        }  # fmt: skip

    # -- running --------------------------------------------------------------------------------

    def start(self, tasks: asyncio.TaskGroup) -> None:
        for member in self.members:
            self._keepers.append(tasks.create_task(member.keep(), name=f"keep {member.label}"))

    def member(self, name: str) -> Member:
        return next(member for member in self.members if member.name == name)

    def of(self, role: str) -> list[Member]:
        return [member for member in self.members if member.role == role]

    def url(self, name: str) -> str:
        return f"http://{self.ip(name)}:{_API}"

    def qdiscs(self, name: str) -> str:
        """What tc says of a host's device."""
        return self.spaces[name].tc("qdisc", "show", "dev", "eth0").stdout

    async def stop(self) -> None:
        """Every member by SIGTERM: members before the controller."""
        await asyncio.gather(
            *(member.stop() for member in self.members if member.role != "controller")
        )
        await self.member("c").stop()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def close(self) -> None:
        """Everything that is left goes, by its own id."""
        with contextlib.suppress(Exception):
            await self.stop()
        for link in self.tcp.values():
            await link.close()
        if self.fins is not None:
            await self.fins.close()
        await asyncio.to_thread(self._remove)

    def _remove(self) -> None:
        if self.root == Path():
            return
        end_jobs(self.root)
        if self.ray:
            ray_cluster.stop(self.root / f"gpu-{RAY}" / "state" / "ray")
        if self.postgres is not None:
            self.postgres.close()
        if self._net is not None:
            self._net.close()
        for mount in reversed(self._mounts):
            subprocess.run(["umount", "--lazy", mount], check=False, timeout=20)
        shutil.rmtree(self.root, ignore_errors=True)


def end_jobs(root: Path) -> None:
    """End the supervisors of jobs that still run; their commands die with them."""
    for claim in root.glob("gpu-*/state/jobs/*/*/claim"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = int(json.loads(claim.read_text())["pid"])
            if str(claim.parent).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def remove_stale() -> None:
    """What campaigns left whose own process was killed."""
    netns.remove_stale(PREFIX)
    for path in Path("/tmp").glob(f"{PREFIX}-*-*"):
        found = _STALE.match(path.name)
        if found is None or Path(f"/proc/{found[1]}").exists():
            continue
        for mount in [*sorted(path.glob("*/state")), path / "pg"]:
            if mount.is_mount():
                subprocess.run(["umount", "--lazy", mount], check=False, timeout=20)
        shutil.rmtree(path, ignore_errors=True)
