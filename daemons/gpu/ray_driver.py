"""The Ray driver of intentd-gpu, in a process of its own: the only place that imports ray.

    python -m intentd.daemons.gpu.ray_driver DESCRIPTOR PARENT        (started by the daemon)

Ray may end its driver (when its centre is away for a minute), replace signal handlers and block;
so the daemon keeps it at arm's length: JSON lines over a socket, and a new driver when this one
ends. It decides nothing (see ``ray_fleet``): it connects, finds the slots of a former driver, and
carries out what the fleet says. Runs do not depend on it.

First line in: ``{"kind": "hello", "term", "address", "namespace", "heartbeat_s", "lease_s",
"lost_after_s", "nodes": [name]}``; then ``adopt``, ``start``, ``stop``, ``all`` and ``bye``. Out:
``refused``, ``connected``, ``beat``, ``node_joined``, ``node_lost``, ``started``, ``signalled``,
``exited``, ``lost``, ``progress``, ``output``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

if __name__ == "__main__":  # before the imports that take seconds: never without its daemon
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[2]):
        sys.exit(0)

import asyncio
import inspect
import json
import re
import socket
import time
import uuid
from typing import Any, Final

import ray
from ray import cloudpickle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from intentd.daemons.gpu import ray_runner, ray_slot
from intentd.daemons.gpu.ray_fleet import Call, Create, Fleet, Key, Kill, Say
from intentd.daemons.kit.reach import require_listener

PREFIX: Final = "intentd-slot"
LINE_BYTES: Final = 1 << 24
MAKE_TIMEOUT_S: Final = 90.0
CALL_TIMEOUT_S: Final = 10.0
AGAIN_S: Final = 0.5


def name_of(key: Key, node_id: str) -> str:
    """A slot's name in Ray; no two are ever equal."""
    return f"{PREFIX}/{key[0]}/{key[1]}/{node_id}/{uuid.uuid4().hex[:8]}"


def parse_name(name: str) -> tuple[Key, str] | None:
    parts = name.split("/")
    if len(parts) != 5 or parts[0] != PREFIX or not parts[2].isdecimal():
        return None
    return (parts[1], int(parts[2])), parts[3]


class Driver:
    """hello: the daemon's first message."""

    def __init__(self, hello: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.term = int(hello["term"])
        self.namespace = str(hello["namespace"])
        self.address = str(hello["address"])
        self.heartbeat_s = float(hello["heartbeat_s"])
        self.lease_s = float(hello["lease_s"])
        self.fleet = Fleet(
            float(hello["lost_after_s"]),
            self.lease_s,
            self.heartbeat_s,
            time.monotonic(),
            hello["nodes"],
        )
        self._writer = writer
        self._actors: dict[int, Any] = {}  # slot number -> handle
        self._names: dict[int, str] = {}
        self._watching: dict[int, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup
        self._runner = inspect.getsource(ray_runner)
        self._doing: set[asyncio.Task[None]] = set()

    def connect(self) -> None:
        """Joins the cluster. Raises OSError if nobody is there, and what Ray raises."""
        try:
            require_listener(self.address)
        except OSError as error:
            raise OSError(f"no cluster at {self.address}: {error}") from None
        cloudpickle.register_pickle_by_value(ray_slot)
        ray.init(
            address=self.address,
            namespace=self.namespace,
            log_to_driver=False,
            configure_logging=False,
        )

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Until the daemon goes away."""
        async with asyncio.TaskGroup() as self._tasks:
            await self._find()
            seen = await asyncio.to_thread(living_nodes)
            self.fleet.nodes_seen(seen, time.monotonic())
            self._say({"kind": "connected", "nodes": [name for name, _, _ in seen]})
            self._act()
            self._tasks.create_task(self._look_at_nodes(), name="nodes")
            self._tasks.create_task(self._tick(), name="tick")
            while line := await reader.readline():
                self._hear(json.loads(line))
        os._exit(0)

    # -- with the daemon -----------------------------------------------------------------------

    def _hear(self, message: dict[str, Any]) -> None:
        now = time.monotonic()
        match message["kind"]:
            case "start":
                self.fleet.start(message, now)
            case "stop":
                self.fleet.stop(message, now)
            case "adopt":
                self.fleet.adopt(message, now)
            case "all":
                self.fleet.told_all()
            case "bye":
                os._exit(0)
        self._act()

    def _say(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode("ascii") + b"\n")

    # -- with the cluster ----------------------------------------------------------------------

    def _act(self) -> None:
        while acts := self.fleet.take():
            for act in acts:
                match act:
                    case Say(message):
                        self._say(message)
                    case Create():
                        self._spawn(self._create(act))
                    case Call():
                        self._spawn(self._call(act))
                    case Kill():
                        self._forget(act)

    def _spawn(self, work: Any) -> None:
        task = self._tasks.create_task(work)
        self._doing.add(task)
        task.add_done_callback(self._doing.discard)

    def _forget(self, act: Kill) -> None:
        actor = self._actors.pop(act.number, None)
        name = self._names.pop(act.number, "")
        task = self._watching.pop(act.number, None)
        if task is not None:
            task.cancel()
        if actor is not None:
            self._spawn(self._bury(act, actor, name))

    async def _bury(self, act: Kill, actor: Any, name: str) -> None:
        """Kills the slot and waits until Ray's centre has it struck off."""
        while True:
            await asyncio.to_thread(kill_quietly, actor)
            if name not in await asyncio.to_thread(ray.util.list_named_actors):
                break
            await asyncio.sleep(AGAIN_S)
        self.fleet.buried(act.key, act.number, time.monotonic())
        self._act()

    async def _find(self) -> None:
        """Slots that were made before."""
        for name in await asyncio.to_thread(ray.util.list_named_actors):
            known = parse_name(name)
            if known is None:
                continue
            try:
                actor = await asyncio.to_thread(ray.get_actor, name)
            except ValueError:  # gone meanwhile
                continue
            number = self.fleet.found(*known, time.monotonic())
            if not number:
                await asyncio.to_thread(kill_quietly, actor)
                continue
            self._actors[number], self._names[number] = actor, name
            self._watching[number] = self._tasks.create_task(self._watch(known[0], number))

    async def _create(self, act: Create) -> None:
        slot = ray.remote(ray_slot.Slot)
        mark = f"{self.namespace}@{self.address}/{act.key[0]}/{act.key[1]}"
        self._names[act.number] = name_of(act.key, act.node_id)
        options = {
            "name": self._names[act.number],
            "namespace": self.namespace,
            "lifetime": "detached",
            "num_gpus": 1,
            "num_cpus": 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 64,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(act.node_id, soft=False),
        }
        actor = slot.options(**options).remote(*act.key, mark, self._runner, self.lease_s)
        self._actors[act.number] = actor
        task = self._tasks.create_task(self._watch(act.key, act.number))
        self._watching[act.number] = task

    async def _watch(self, key: Key, number: int) -> None:
        """Hears of a slot from its making to its end."""
        actor = self._actors[number]
        seen = -1
        while number in self._actors:
            first, now = seen < 0, time.monotonic()
            try:
                if first:
                    state = await asyncio.wait_for(actor.hello.remote(self.term), MAKE_TIMEOUT_S)
                    if state["protocol"] != ray_slot.PROTOCOL:
                        raise ActorDiedError("made by another version")
                else:
                    wait_s = self.heartbeat_s
                    state = await asyncio.wait_for(
                        actor.watch.remote(self.term, seen, wait_s), wait_s + CALL_TIMEOUT_S
                    )
            except (ActorUnavailableError, TimeoutError):
                self.fleet.down(key, number, time.monotonic(), dead=False)
                self._act()
                await asyncio.sleep(AGAIN_S)
                continue
            except (ActorDiedError, ActorUnschedulableError):
                kill_quietly(actor)
                self._actors.pop(number, None)
                self._names.pop(number, None)
                self._watching.pop(number, None)
                self.fleet.down(key, number, time.monotonic(), dead=True)
                self._act()
                return
            except RayTaskError as error:
                if isinstance(error.cause, ray_slot.StaleTermError) or "StaleTerm" in str(error):
                    os._exit(3)  # there is a newer driver
                raise
            now = time.monotonic()
            seen = int(state["version"])
            self._pass_output_on(actor, state)
            if first:
                self.fleet.up(key, number, state, now)
            else:
                self.fleet.heard(key, number, state, now)
            self._act()

    def _pass_output_on(self, actor: Any, state: dict[str, Any]) -> None:
        first, data = state["output"]
        if not data or state["run"] is None:
            return
        job, _, epoch = state["run"]["run"].partition(".")
        text = data.decode("latin-1")
        self._say({"kind": "output", "job": int(job), "epoch": int(epoch), "text": text})
        actor.taken.remote(self.term, first + len(data))

    async def _call(self, act: Call) -> None:
        actor = self._actors.get(act.number)
        if actor is None:
            return
        method = getattr(actor, act.method)
        try:
            answer = await asyncio.wait_for(method.remote(self.term, *act.args), CALL_TIMEOUT_S)
        except (ActorUnavailableError, ActorDiedError, TimeoutError):
            if act.method == "start":
                self.fleet.call_failed(act.key, act.number, act.run)
                self._act()
            return  # its watch tells what became of it
        if act.method == "start":
            self.fleet.began(act.key, act.number, act.run, answer)
        else:
            self._say({"kind": "signalled", "run": act.run, "at_s": answer["at_s"]})
            self.fleet.stopped(act.key, act.number, act.run)
        self._act()

    async def _look_at_nodes(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_s)
            seen = await asyncio.to_thread(living_nodes)
            self.fleet.nodes_seen(seen, time.monotonic())
            self._act()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_s / 2)
            self.fleet.tick(time.monotonic())
            self._act()
            self._say({"kind": "beat"})


def living_nodes() -> list[tuple[str, str, int]]:
    """(name, node id, GPUs) of the nodes that have GPUs. Blocking."""
    return [
        (
            re.sub(r"[^A-Za-z0-9_.\-]", "-", node["NodeName"])[:64],
            node["NodeID"],
            int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
    ]


def kill_quietly(actor: Any) -> None:
    try:
        ray.kill(actor, no_restart=True)
    except Exception:  # noqa: BLE001  it is gone already, whatever Ray says
        return


async def drive(descriptor: int) -> int:
    """Returns the exit status."""
    stream = socket.socket(fileno=descriptor)
    reader, writer = await asyncio.open_connection(sock=stream, limit=LINE_BYTES)
    line = await reader.readline()
    if not line:
        return 0
    driver = Driver(json.loads(line), writer)
    try:
        driver.connect()
    except Exception as error:  # noqa: BLE001  Ray raises what it likes; the daemon tries again
        text = str(error).strip().splitlines() or [type(error).__name__]
        writer.write(json.dumps({"kind": "refused", "why": text[0]}).encode() + b"\n")
        await writer.drain()
        return 2
    await driver.run(reader)
    return 0


def main() -> int:
    status = asyncio.run(drive(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
