"""A small suite for the tests of the console: controller, GPU scheduler, proxy, an agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from tests.unit.proxy.provider import running

from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.core.stats import LogHistogram
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.config import ControllerSection, DaemonConfig
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.daemons.kit.link import MemberLink
from intentd.daemons.kit.tokens import token_hash

WAIT_S = 90.0
HOSTILE = "<script>alert(1)</script>'\"&"  # names that others choose
BORDERS = (3e4, 7e5, float("inf"))  # of the classes that the reports know
TOKENS = {"read": "r-secret", "operate": "o-secret", "admin": "a-secret"}


class AgentConfig(DaemonConfig):
    """A member that reports flows."""

    role: ClassVar[str] = "agent"


class Suite:
    """url: the controller's. agent, domain: names that others choose. Lives until close()."""

    def __init__(self, where: Path, agent: str = HOSTILE, domain: str = "rack <1>") -> None:
        self.where = where
        self.agent, self.domain = agent, domain
        self.hub = f"ipc://{where}/hub"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = ""
        self._stop: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self.provider_url = ""

    def admin(self, role: str) -> AdminClient:
        return AdminClient(self.where / "run" / f"{role}.admin.sock", timeout_s=30)

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._background(ready)))
        self._thread.start()
        assert ready.wait(WAIT_S)
        self._spawn(
            "controller",
            "intentd.controller.daemon",
            f'[hub]\nbind = "{self.hub}"\nreport_interval_s = 0.3\n'
            "[flows]\nthresholds_interval_s = 0.3\nrates_interval_s = 0.3\nmin_flows = 200\n"
            "[jobs]\nhistory_interval_s = 0.2\nmin_jobs = 40\nevaluations = 40\nseconds = 20\n"
            'samples = 1\nsample_jobs = 40\n[prompts]\ninterval_s = 0.3\ndaily = "5"\n',
        )
        link = f'[controller]\nendpoint = "{self.hub}"\nbackoff_min_s = 0.05\n'
        self._spawn(
            "gpu",
            "intentd.daemons.gpu.daemon",
            f'{link}[jobs]\nexecutor = "sim"\nnodes = [{{ name = "n1", gpus = 8 }}]\n',
        )
        models = "".join(
            f'[[models]]\nname = "{name}"\nbase_url = "{self.provider_url}"\n'
            f'price_in = "{price}"\nprice_out = "{price}"\n'
            for name, price in (("tiny", 1), ("mid", 10), ("big", 100))
        )
        self._spawn(
            "proxy", "intentd.proxy.daemon", f'{link}[listen]\nbind = "127.0.0.1:0"\n{models}'
        )
        for role in ("controller", "gpu", "proxy"):
            until(lambda role=role: self._ready(role))
        self.url = f"http://{self.admin('controller').call('status')['status_address']}"
        self._submit()

    def _spawn(self, role: str, module: str, settings: str) -> None:
        config = self.where / f"{role}.toml"
        tokens = [f"{name}:{token_hash(secret)}" for name, secret in TOKENS.items()]
        config.write_text(
            f'name = "{role}1"\nstate_dir = "{self.where}/{role}"\nrun_dir = "{self.where}/run"\n'
            f'[status]\nbind = "127.0.0.1:0"\ntokens = {json.dumps(tokens)}\n{settings}'
        )
        with (self.where / f"{role}.log").open("ab") as log:
            command = [sys.executable, "-m", module, "--config", str(config)]
            self.processes[role] = subprocess.Popen(command, stderr=log, env=dict(os.environ))

    def _ready(self, role: str) -> bool:
        log = (self.where / f"{role}.log").read_text
        assert self.processes[role].poll() is None, log()
        try:
            status = self.admin(role).call("status")
        except AdminUnreachableError:
            return False
        return bool(status["ready"] and status["controller"]["connected"])

    def _submit(self) -> None:
        """Short jobs to learn from, then long ones that queue, and short ones behind them."""
        rng, call = random.Random(3), self.admin("gpu").call
        for at in range(60):
            size = rng.choice((0.02, 0.05, 0.3)) * rng.uniform(0.5, 2)
            gpus = rng.choice((1, 2, 4))
            call("jobs.submit", command=["x"], max_gpus=gpus, size_gpu_s=size, name=f"short-{at}")
        for at in range(12):
            size = 400.0 if at % 3 else 9000.0
            call("jobs.submit", command=["x"], min_gpus=2, max_gpus=8, size_gpu_s=size,
                 name=f"long-{at}")  # fmt: skip
        for at in range(6):
            call("jobs.submit", command=["x"], max_gpus=2, size_gpu_s=0.05, name=f"behind-{at}")
        status = self.admin("proxy").call("status")
        for prompt in ("one", "two", HOSTILE):
            body = json.dumps({"prompt": prompt, "service_type": "model_selector"}).encode()
            request = urllib.request.Request(
                f"http://{status['detail']['api']}/v1/request", body,
                {"Content-Type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.status == 200
        until(lambda: self.admin("controller").call("pareto_status")["front"] is not None)
        until(lambda: self.admin("controller").call("policy_show", application="flows") is not None)

    async def _background(self, ready: threading.Event) -> None:
        """A provider of models, and an agent that reports measured flows."""
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(stopped.set)
        config = AgentConfig(
            name=self.agent,
            state_dir=self.where,
            controller=ControllerSection(endpoint=self.hub, backoff_min_s=0.05),
        )
        report = Flows(self.agent, self.domain)
        async with running() as provider:
            self.provider_url = provider.url
            tasks = Tasks()

            def applied(policy: NumberedPolicy) -> PolicyAck:
                return PolicyAck(policy.application, policy.era, policy.number, True)

            link = MemberLink(
                config,
                Kit("agent"),
                on_policy=applied,
                collect_report=report.next,
                capabilities=lambda: {"domains": [{"name": self.domain, "rate_bps": 1e9}]},
            )
            async with tasks:
                await link.start(tasks)
                ready.set()
                await stopped.wait()
                await link.stop()
                tasks.cancel_all()

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
        self._stop()
        if self._thread is not None:
            self._thread.join(30)


class Flows:
    """Reports of an agent whose flows are small mostly and large by bytes."""

    def __init__(self, agent: str, domain: str) -> None:
        self.agent, self.domain = agent, domain
        self.rng = random.Random(1)
        self.sizes = LogHistogram()
        self.fct = [LogHistogram() for _ in BORDERS]
        self.wait = [LogHistogram() for _ in BORDERS]

    def next(self) -> dict[str, Any]:
        new = [min(3e7, self.rng.lognormvariate(8.0, 2.2)) for _ in range(300)]
        for size in new:
            self.sizes.add(size)
            at = next(at for at, border in enumerate(BORDERS) if size <= border)
            wait = self.rng.expovariate(1000 / (1 + 20 * at))
            self.wait[at].add(wait)
            self.fct[at].add(wait + 1e-4 + size * 8 / 1e9 * self.rng.uniform(1, 3))
        return {
            "flows": {
                self.domain: {
                    "histogram": self.sizes.to_plain(),
                    "sample": [[0.001 * at, size] for at, size in enumerate(new)],
                    "arrivals": self.sizes.count,
                    "arrived_bytes": self.sizes.sum,
                    "finished": self.sizes.count,
                    "fct": {str(at): found.to_plain() for at, found in enumerate(self.fct)},
                    "wait": {str(at): found.to_plain() for at, found in enumerate(self.wait)},
                    "queue": [2, 1],
                    "active": [1, 1],
                    "degraded": {"timeout": 1},
                    "tc": {"state": "foreign", "reason": f"a root qdisc of {self.agent}"},
                }
            }
        }


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(AdminRefusedError):
            if holds():
                return
        assert time.monotonic() < deadline, "in time"
        time.sleep(0.05)
