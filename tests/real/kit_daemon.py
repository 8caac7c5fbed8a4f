"""A small daemon on the kit, driven by the tests as a process. Not a test itself."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any, ClassVar

from pydantic import Field

from intentd.core.errors import ConfigError
from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.daemons.kit.config import DaemonConfig, Section
from intentd.daemons.kit.lifecycle import Daemon, run_daemon
from intentd.daemons.kit.link import MemberLink


class ToySection(Section):
    """What the toy does."""

    greeting: str = Field(default="hello", description="What it says.")
    unready: str = Field(default="", description="Why it is not ready.")
    drain_s: float = Field(default=0.0, description="How long it takes to drain.", ge=0)


class ToyConfig(DaemonConfig):
    """Everything common and one section."""

    role: ClassVar[str] = "agent"
    toy: ToySection = Field(default=ToySection(), description="The toy's own.")


class Toy(Daemon[ToyConfig]):
    """Leaves a mark on the host (a file) while it runs, as an agent leaves a qdisc."""

    role = "agent"
    config_model = ToyConfig

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        self._mark = self.config.state_dir / "mark"
        self._mark.write_text("here")
        self._tasks = tasks
        self.link = MemberLink(
            self.config, self.kit, on_policy=self._apply, collect_report=lambda: {"flows": {}}
        )
        await self.link.start(tasks)

    def _apply(self, policy: NumberedPolicy) -> PolicyAck:
        return PolicyAck(policy.application, policy.era, policy.number, True)

    async def reload(self, config: ToyConfig) -> None:
        if config.toy.greeting == "forbidden":
            raise ConfigError("toy.greeting", config.toy.greeting, "something polite")
        if config.toy.greeting == "defect":
            raise ZeroDivisionError("a programmer error")
        self.link.reconfigure(config.controller)

    async def drain(self, deadline_s: float) -> None:
        await asyncio.sleep(self.config.toy.drain_s)

    async def stop(self) -> None:
        self._mark.unlink(missing_ok=True)
        await self.link.stop()

    def unready(self) -> list[str]:
        return [self.config.toy.unready] if self.config.toy.unready else []

    def status(self) -> dict[str, Any]:
        return {"greeting": self.config.toy.greeting}

    async def admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        match command:
            case "crash":
                self._tasks.create_task(self._crash(), name="crashing")
                return {}
            case "crash-callback":
                asyncio.get_running_loop().call_soon(lambda: [].pop())
                return {}
            case "hang":
                time.sleep(args["seconds"])  # noqa: ASYNC251  the point: block the loop
                return {}
        raise AdminRefusedError(f"command {command!r}: unknown", "unknown_command")

    async def _crash(self) -> None:
        raise ZeroDivisionError("a programmer error")


if __name__ == "__main__":
    sys.exit(run_daemon(Toy))
