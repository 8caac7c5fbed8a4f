"""Mutated configurations, fed to real daemons under load: does a reload break, and does it lie?

``python -m benchmarks.reload_mutations --count 10000 --seed 1 --json``: controller, sequencer,
agent, gpu and proxy run; the proxy answers requests and streams, the agent gates flows, all the
time. From one seed, each configuration is a mutation of a role's own: another type, a value out of
range, a key deleted or unknown, broken TOML or UTF-8, files that are not there, and valid changes.
Each is reloaded, by ``reload`` of the admin socket or by SIGHUP, and then

- taken means: the running configuration equals the file, and the agent's domains, the proxy's
  models and the controller's domains are those of the file; refused means: all is as before;
- a configuration that the file's own validation refuses is never taken;
- no daemon has ended, no request or flow has failed, and in the end each daemon is ready. While a
  file is taken that does not serve the load (without its model, or with keys required), an answer
  that says just that is counted apart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.held_service import Service
from benchmarks.restart import Provider
from intentd.agent.client import AsyncFlows
from intentd.daemons.ctl.daemon import daemon_class
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.daemons.kit.config import InvalidConfigError, parse_config

ROLES: Final = ("controller", "sequencer", "agent", "gpu", "proxy")
BASE: Final = "base"  # the kind of a file that is not mutated
Table = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- TOML, as far as these tables need it -----------------------------------------------------


def toml(table: Table) -> str:
    """A table as TOML: its sections inline, one setting a line."""
    return "".join(f"{_key(name)} = {_value(value)}\n" for name, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True)
    return repr(value)


def _key(name: str) -> str:
    return json.dumps(name)


# -- mutations -------------------------------------------------------------------------------

ODD: Final[tuple[Any, ...]] = (
    "", "x", "-1", -1, 0, 1, 2**31, 2**63, -(2**63), 1e308, -0.5, 0.5, float("inf"), float("nan"),
    True, False, [], ["x"], [[]], {}, {"x": 1}, "\x00", "\n", "ü", "x" * 5000, "/nowhere/file",
    "tcp://127.0.0.1:1", "tcp://*:99999", "0.0.0.0:0", "10ms", "1GiB", "1Gbit", "1e400s",
)  # fmt: skip

# settings whose values may change while the daemon runs, by role
VALID: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "controller": {
        "flows.load_window_s": (30, 60, "2min"),
        "flows.min_flows": (200, 500),
        "flows.policy": ("2d", "ps"),
        "hub.report_interval_s": (1, 2, 3),
        "hub.max_members": (100, 1000),
        "jobs.rest_s": (60, 90),
        "prompts.half_life_s": (600, 3600),
        "flows.domains": ([], [{"domain": "up", "rate": "1Gbit"}], [{"domain": "b"}]),
        "drain_timeout_s": (5, 7),
        "log.level": ("info", "warning"),
    },
    "sequencer": {
        "controller.report_interval_s": (1, 2, 3),
        "controller.backoff_max_s": (5, 20),
        "drain_timeout_s": (5, 7),
        "log.level": ("info", "warning"),
        "status.tokens": ([], ["ab" * 32]),
    },
    "agent": {
        "tc_verify_interval_s": (5, 10, 20),
        "domains": (
            [{"name": "up", "default": True}],
            [{"name": "up", "default": True}, {"name": "lab", "peers": ["10.9.0.0/16"]}],
            [{"name": "up", "default": True, "rate_bps": "2Gbit"}],
        ),
        "controller.report_interval_s": (1, 2, 3),
        "log.level": ("info", "warning"),
    },
    "gpu": {
        "jobs.quotas": ({}, {"ann": 2}, {"ann": 1, "bob": 3}),
        "jobs.profiles": ({}, {"half": [0, 1, 1.5]}),
        "jobs.max_jobs": (100, 1000),
        "costs.preempt_s": (0, 1, "2s"),
        "output.keep_jobs": (10, 100),
        "log.level": ("info", "warning"),
    },
    "proxy": {
        "upstream.attempts": (1, 2, 3),
        "upstream.cooldown_failures": (5, 50),
        "upstream.prompt_cache_s": (0, 300),
        "records.recent": (10, 5000),
        "records.max_rows": (0, 1000),
        "budgets": ([], [{"limit": "1000000", "unit": "requests"}]),
        "conversations.wait_s": (10, 300),
        "service_types": ([], [{"name": "mine", "stages": [{"model": "one"}]}]),
        "log.level": ("info", "warning"),
    },
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a table, its inner ones too."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*path, name))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            found += places(inner, (*path, index))
    return found


class Mutator:
    """Makes files of one role from its base table; all is drawn from rng.

    full: every setting with its default, to aim at what the base does not name.
    """

    def __init__(self, role: str, base: Table, full: Table, rng: random.Random) -> None:
        self._role = role
        self._base = base
        self._full = full
        self._rng = rng
        self._kinds: dict[str, Callable[[Table], bytes]] = {
            "valid": self._valid,
            "odd value": self._odd,
            "odd default": self._odd_default,
            "deleted": self._deleted,
            "unknown": self._unknown,
            "broken": self._broken,
            "noise": self._noise,
        }

    def make(self) -> tuple[str, bytes]:
        """What kind it is, and the file."""
        kind = self._rng.choices(list(self._kinds), (5, 3, 4, 2, 2, 2, 1))[0]
        return kind, self._kinds[kind](copy.deepcopy(self._base))

    def _set(self, table: Table, path: tuple[Any, ...], value: Any) -> None:
        target: Any = table
        for part in path[:-1]:
            target = target.setdefault(part, {}) if isinstance(target, dict) else target[part]
        target[path[-1]] = value

    def _valid(self, table: Table) -> bytes:
        choices = VALID[self._role]
        for name in self._rng.sample(sorted(choices), self._rng.randint(1, 3)):
            self._set(table, tuple(name.split(".")), self._rng.choice(choices[name]))
        return toml(table).encode()

    def _odd(self, table: Table) -> bytes:
        self._set(table, self._rng.choice(places(table)), self._rng.choice(ODD))
        return toml(table).encode()

    def _odd_default(self, table: Table) -> bytes:
        path = self._rng.choice([p for p in places(self._full) if all(type(x) is str for x in p)])
        with contextlib.suppress(AttributeError, TypeError):  # inside of a value that is no table
            self._set(table, path, self._rng.choice(ODD))
        return toml(table).encode()

    def _deleted(self, table: Table) -> bytes:
        path = self._rng.choice(places(table))
        target: Any = table
        for part in path[:-1]:
            target = target[part]
        del target[path[-1]]
        return toml(table).encode()

    def _unknown(self, table: Table) -> bytes:
        inner = [path for path in places(table) if isinstance(_at(table, path), dict)]
        path = self._rng.choice([(), *inner])
        name = self._rng.choice(("nonsense", "naem", "", "Name", "x.y", "ü"))
        self._set(table, (*path, name), self._rng.choice(ODD))
        return toml(table).encode()

    def _broken(self, table: Table) -> bytes:
        data = bytearray(toml(table).encode())
        for _ in range(self._rng.randint(1, 4)):
            at = self._rng.randrange(len(data))
            match self._rng.randrange(3):
                case 0:
                    del data[at]
                case 1:
                    data[at] = self._rng.choice(b'"[]{}=\n\x00\xff\xc3#')
                case _:
                    data.insert(at, self._rng.choice(b'"[]{}=\n\x00\xff\xc3#'))
        return bytes(data)

    def _noise(self, table: Table) -> bytes:
        match self._rng.randrange(4):
            case 0:
                return self._rng.randbytes(self._rng.randint(0, 200))
            case 1:
                return b"a = " + b"[" * self._rng.randint(1, 5000)
            case 2:
                return toml(table).encode()[: self._rng.randint(1, 200)]
            case _:
                return b"\xef\xbb\xbf" + toml(table).encode()


def _at(table: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        table = table[part]
    return table


# -- the daemons and what they work on -----------------------------------------------------------


class Site:
    """Five daemons in one directory, their clients, and what went wrong."""

    def __init__(self, base: Path, provider: Provider) -> None:
        hub, turns = f"ipc://{base}/hub", f"ipc://{base}/turns"
        link = {"controller": {"endpoint": hub}}
        status = {"status": {"bind": "127.0.0.1:0"}}
        swift = {"reload": {"window_s": 30, "grace_s": 20}}
        domains = [{"name": "up", "default": True, "sequencer": {"endpoint": turns}}]
        model = {"name": "m", "base_url": provider.url}
        own: dict[str, Table] = {
            "controller": {"hub": {"bind": hub}},
            "sequencer": {**link, "turns": {"bind": turns}},
            "agent": {**link, "domains": domains, "fin": {"bind": "127.0.0.1:0"}},
            "gpu": {**link, "jobs": {"executor": "sim"}},
            "proxy": {**link, "listen": {"bind": "127.0.0.1:0"}, "models": [model]},
        }
        self.base = base
        self.tables: dict[str, Table] = {}
        self.services: dict[str, Service] = {}
        for role in ROLES:
            places_of = {"state_dir": f"{base}/state-{role}", "run_dir": f"{base}/run"}
            self.tables[role] = {**places_of, **status, **swift, **own[role]}
            service = self.services[role] = Service(base, role, "")
            service.config.write_text(toml(self.tables[role]))
        self.failures: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.over = False
        # Whether the proxy may run a file that does not serve the load: without its model, or
        # with keys required. Then a refusal that says so is the right answer.
        self.unserving = False
        self.unserving_until_s = 0.0

    async def start(self) -> None:
        for role in ROLES:
            await self.services[role].start()

    async def requests(self, address: str, *, stream: bool) -> None:
        url = f"http://{address}/v1/chat/completions"
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        async with aiohttp.ClientSession() as session:
            while not self.over:
                began_s = time.monotonic()
                try:
                    async with session.post(url, json=body) as answer:
                        data = await answer.read()
                        done = b"[DONE]" in data if stream else answer.status == 200
                        said = b"model_not_found" in data or b"missing_api_key" in data
                        unserved = self.unserving or began_s <= self.unserving_until_s
                        if not done and said and unserved:
                            self.served["refused as configured"] += 1
                        else:
                            self._count("stream" if stream else "request", done, data[:200])
                except (aiohttp.ClientError, OSError) as error:
                    self._count("request", False, repr(error))
                await asyncio.sleep(0.02)

    async def flows(self) -> None:
        """Gated flows: none may be refused, or find the agent gone."""
        flows = AsyncFlows(str(self.base / "run" / "agent.sock"), answer_timeout_s=30.0)
        while not self.over:
            async with flows.open(1000) as flow:
                gone = flow.degraded in ("absent", "slow", "closed", "protocol", "refused")
                self._count("flow", not gone, f"{flow.degraded} {flow.error}")
            await asyncio.sleep(0.02)
        flows.close()

    def _count(self, kind: str, good: bool, what: object) -> None:
        self.served[kind] += 1
        if not good:
            self.failures[f"{kind}: {what!s:.160}"] += 1

    def close(self) -> None:
        for service in self.services.values():
            service.close()


class Campaign:
    """Reloads of one site, each checked."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site = site
        self.rng = random.Random(seed)
        self.lies: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()  # mutated files, by kind and outcome
        self.unmutated: Counter[str] = Counter()  # each role's own file again, at the end
        self.validation_raised = self.internal_errors = 0
        self.reasons: Counter[str] = Counter()
        self.running: dict[str, Any] = {}
        self.models = {role: daemon_class(role).config_model for role in ROLES}
        self.mutators = {}
        for role in ROLES:
            table = site.tables[role]
            full = parse_config(self.models[role], toml(table).encode(), {}).model_dump(mode="json")
            rng = random.Random(self.rng.getrandbits(64))
            self.mutators[role] = Mutator(role, table, full, rng)

    async def run(self, count: int) -> None:
        """count reloads, spread over the roles, which do theirs side by side."""
        async with asyncio.TaskGroup() as tasks:
            for index, role in enumerate(ROLES):
                share = count // len(ROLES) + (index < count % len(ROLES))
                tasks.create_task(self._role(role, share, random.Random(self.rng.getrandbits(64))))

    async def _role(self, role: str, count: int, rng: random.Random) -> None:
        self.running[role] = await self._config(role)
        for number in range(count):
            kind, source = self.mutators[role].make()
            await self._one(role, kind, source, by_signal=rng.random() < 0.1)
            if number % 200 == 199:
                say(f"{role}: {number + 1} of {count}, {len(self.lies)} lies of all so far")
        source = toml(self.site.tables[role]).encode()  # it still takes what is right
        await self._one(role, BASE, source, by_signal=False)

    async def _one(self, role: str, kind: str, source: bytes, *, by_signal: bool) -> None:
        service = self.site.services[role]
        service.config.write_bytes(source)
        try:
            wanted: Any = _canonical(parse_config(self.models[role], source, {}))
        except InvalidConfigError:
            wanted = None
        except Exception as error:  # noqa: BLE001  the daemon must refuse this too
            self.validation_raised += 1
            self.lies.append({"role": role, "kind": kind, "validation": repr(error)[:200]})
            wanted = None
        if role == "proxy" and wanted is not None and not _serves(wanted):
            self.site.unserving = True
        taken, reason = await (self._hang_up(role) if by_signal else self._ask(role))
        outcome = "taken" if taken else "refused"
        if kind == BASE:
            self.unmutated[outcome] += 1
        else:
            self.counts[f"{kind}: {outcome}"] += 1
        if not taken:
            self.reasons[reason.split(": got")[0][:60]] += 1
        if reason.startswith("internal error"):
            self.internal_errors += 1
            self.lies.append({"role": role, "kind": kind, "reason": reason[:200]})
        now = await self._config(role)
        expected = wanted if taken else self.running[role]
        inside = await self._inside(role, expected)
        if now != expected or inside or (taken and wanted is None):
            self.lies.append(
                {"role": role, "kind": kind, "taken": taken, "reason": reason[:200],
                 "inside": inside, "file": source[:2000].decode(errors="replace")}
            )  # fmt: skip
        self.running[role] = now
        if role == "proxy" and self.site.unserving and _serves(now):
            self.site.unserving, self.site.unserving_until_s = False, time.monotonic()

    async def _ask(self, role: str) -> tuple[bool, str]:
        try:
            await self.site.services[role].admin.acall("reload")
        except AdminRefusedError as error:
            return False, str(error)
        return True, ""

    async def _hang_up(self, role: str) -> tuple[bool, str]:
        """By signal; status says when it is done, and what became of it."""
        service = self.site.services[role]
        before = (await service.status())["reload"]["requests"]
        assert service.process is not None, "it runs"
        service.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(60):
            while True:
                shown = (await service.status())["reload"]
                if shown["requests"] > before:
                    return shown["outcome"] != "refused", shown["reason"]
                await asyncio.sleep(0.005)

    async def _inside(self, role: str, config: Any) -> str:
        """What a role does with its configuration, where it shows; empty: as the file says."""
        admin = self.site.services[role].admin
        if role == "agent":
            held = (await admin.acall("domains"))["domains"]
            found = {row["name"]: list(row["peers"]) for row in held}
            wanted = {row["name"]: list(row["peers"]) for row in config["domains"]}
            return "" if found == wanted else f"domains {found}"
        if role == "proxy":
            models = (await admin.acall("models"))["models"]
            names = [(row["name"], row["base_url"]) for row in models]
            expected = [(row["name"], row["base_url"]) for row in config["models"]]
            return "" if names == expected else f"models {names}"
        if role == "controller":
            domains = (await self.site.services[role].status())["detail"]["domains"]
            known = {row["domain"] for row in domains}
            missing = {row["domain"] for row in config["flows"]["domains"]} - known
            return f"no domains {sorted(missing)}" if missing else ""
        return ""

    async def _config(self, role: str) -> Any:
        return json.loads(json.dumps(await self.site.services[role].admin.acall("config")))


def _serves(config: Any) -> bool:
    """Whether the proxy's configuration answers what the load asks."""
    names = [model["name"] for model in config["models"]]
    return "m" in names and not config["keys"]["required"]


def _canonical(config: Any) -> Any:
    return json.loads(json.dumps(config.model_dump(mode="json")))


async def campaign(count: int, seed: int, base: Path) -> dict[str, Any]:
    """Everything: the daemons, the load, the reloads. What it found."""
    provider = Provider(chunks=3)
    await provider.start()
    site = Site(base, provider)
    made = Campaign(site, seed)
    began = time.monotonic()
    try:
        await site.start()
        address = (await site.services["proxy"].status())["detail"]["api"]
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(site.requests(address, stream=False))
                tasks.create_task(site.requests(address, stream=True))
                tasks.create_task(site.flows())
            try:
                await made.run(count)
            finally:
                site.over = True
        ended = {
            role: service.process.returncode
            for role, service in site.services.items()
            if service.process is not None and service.process.poll() is not None
        }
        states = {role: (await site.services[role].status())["ready"] for role in ROLES}
        errors = await _handled(site)
    finally:
        site.close()
        await provider.stop()
    failed = sum(site.failures.values())
    taken = sum(n for name, n in made.counts.items() if name.endswith(": taken"))
    refused = made.counts.total() - taken
    return {
        "seed": seed,
        "configurations": count,
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": dict(sorted(made.counts.items())),
        "taken": taken,
        "refused": refused,
        "unmutated": dict(made.unmutated),
        "validation_raised": made.validation_raised,
        "internal_errors": made.internal_errors,
        "lies": len(made.lies),
        "lies_shown": made.lies[:20],
        "served": dict(site.served),
        "dropped": failed,
        "dropped_shown": dict(site.failures.most_common(10)),
        "crashes": len(ended),
        "handled_errors": errors,
        "ready_at_the_end": states,
        "refused_settings": len(made.reasons),
        "ok": not made.lies
        and not failed
        and not ended
        and all(states.values())
        and taken + refused == count
        and made.unmutated == {"taken": len(ROLES)},
    }


async def _handled(site: Site) -> dict[str, float]:
    """Errors of ours that a daemon met and lived through, from its metrics."""
    found = {}
    for role, service in site.services.items():
        text = (await service.admin.acall("metrics"))["text"]
        for line in text.splitlines():
            if line.startswith("intentd_errors_total{"):
                found[f"{role} {line.split('{')[1].split('}')[0]}"] = float(line.rsplit(" ", 1)[1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="reload-"))
    for name in [name for name in os.environ if name.startswith("INTENTD_")]:
        del os.environ[name]  # the settings of whoever runs this are not the daemons'
    try:
        figures = asyncio.run(campaign(arguments.count, arguments.seed, base))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if arguments.json:
        print(json.dumps(figures, indent=2))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
