"""Configuration of intentd-gpu."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from intentd.core.errors import ConfigError
from intentd.core.jobs.ledger import Rules
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import NAMES, Costs
from intentd.daemons.kit.config import DaemonConfig, Duration, Section, Size


class NodeSection(Section):
    """A node and its GPUs."""

    name: str = Field(description="Its name.", pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    gpus: int = Field(description="GPUs it has.", ge=1, le=4096)
    gpu_type: str = Field(
        default="",
        description="Their type. Several types are pools, each with its own weights.",
        pattern=r"^[A-Za-z0-9_.\-]{0,64}$",
    )


class CostsSection(Section):
    """What changing an allocation takes; predictions count it."""

    start_s: Duration = Field(default=0.0, description="From a start to the first step.", ge=0)
    preempt_s: Duration = Field(
        default=0.0, description="Added to a start from a checkpoint.", ge=0
    )
    min_runtime_s: Duration = Field(
        default=0.0,
        description="A started job keeps its smallest allocation at least so long.",
        ge=0,
    )
    checkpoint_s: Duration = Field(
        default=0.0,
        description="How often jobs save by themselves; 0: only when they are asked to.",
        ge=0,
    )
    hold_growth_s: Duration = Field(
        default=30.0,
        description="A run is not stopped to give it more GPUs before it ran so long.",
        ge=0,
    )

    def costs(self) -> Costs:
        return Costs(
            start_s=self.start_s,
            resize_s=self.start_s + self.preempt_s,  # a run is stopped and started anew
            preempt_s=self.preempt_s,
            min_runtime_s=self.min_runtime_s,
            checkpoint_s=self.checkpoint_s,
        )


class OutputSection(Section):
    """What jobs print, and how long records stay."""

    max_bytes: Size = Field(
        default=16 << 20,
        description="Output kept of a job; a full file becomes the older of two.",
        ge=4096,
    )
    keep_jobs: int = Field(
        default=10_000, description="Jobs that are over whose records and output stay.", ge=1
    )


class JobsSection(Section):
    """How jobs run and what bounds them."""

    executor: str = Field(
        default="local",
        description="local: child processes on this host. ray: processes on a Ray cluster. "
        "sim: nothing runs, time passes.",
        pattern="^(local|ray|sim)$",
    )
    nodes: tuple[NodeSection, ...] = Field(
        default=(NodeSection(name="local", gpus=1),),
        description="Nodes. With the local executor all are on this host; so are those of a Ray "
        "cluster of the daemon's own. Another Ray cluster says itself what nodes it has.",
    )
    policy: str = Field(
        default="fifo", description="Until the controller says another: " + ", ".join(NAMES) + "."
    )
    launcher: str = Field(
        default="",
        description="Socket of intentd-gpu-launcher (`/run/intentd/launcher.sock`): jobs of the "
        "local executor run as their owners. Empty: as the daemon's user.",
        pattern="^(/.*)?$",
    )
    launcher_dir: Path = Field(
        default=Path("/var/lib/intentd/jobs"),
        description="Where the launcher keeps runs and outputs (its `--base`, named jobs).",
    )
    quotas: dict[str, int] = Field(
        default={},
        description="Owner -> GPUs at once; `*` for those not named.",
    )
    profiles: dict[str, tuple[float, ...]] = Field(
        default={},
        description="Named demand: speed at 0, 1, 2, ... GPUs.",
    )
    default_size_gpu_s: Duration = Field(
        default=3600.0, description="Size of a job of which nothing is known.", gt=0
    )
    max_jobs: int = Field(
        default=20_000, description="Unfinished jobs beyond are refused.", ge=1, le=1_000_000
    )

    @model_validator(mode="after")
    def _check(self) -> JobsSection:
        names = [node.name for node in self.nodes]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ConfigError(f"nodes[{index}].name", name, "a name used once")
        if self.launcher and self.executor != "local":
            raise ConfigError("launcher", self.launcher, 'empty unless executor is "local"')
        if self.launcher_dir.name != "jobs" or not self.launcher_dir.is_absolute():
            raise ConfigError("launcher_dir", str(self.launcher_dir), "a path that ends in /jobs")
        if self.policy not in NAMES:
            raise ConfigError("policy", self.policy, f"one of {', '.join(NAMES)}")
        for owner, gpus in self.quotas.items():
            if gpus < 1:
                raise ConfigError(f"quotas.{owner}", gpus, "a number of GPUs >= 1")
        for name, speeds in self.profiles.items():
            if len(speeds) < 2 or speeds[0] != 0 or not all(0 < x < 1e6 for x in speeds[1:]):
                raise ConfigError(f"profiles.{name}", list(speeds), "0, then speeds > 0")
        return self

    def placement(self) -> list[Node]:
        return [Node(node.name, node.gpus, gpu_type=node.gpu_type) for node in self.nodes]

    def rules(self, hold_growth_s: float) -> Rules:
        return Rules(
            quotas=self.quotas,
            default_size_gpu_s=self.default_size_gpu_s,
            max_jobs=self.max_jobs,
            hold_growth_s=hold_growth_s,
        )


class RaySection(Section):
    """The Ray cluster of `jobs.executor = "ray"`."""

    address: str = Field(
        default="",
        description="Of its head, host:port. Empty: a cluster of the daemon's own on this host, "
        "with the nodes and GPUs of `jobs.nodes`, simulated where there are none. It goes on "
        "when the daemon stops; `python -m intentd.daemons.gpu.ray_cluster --stop DIR` ends it.",
        pattern=r"^([A-Za-z0-9_.\-]+:[0-9]{1,5})?$",
    )
    namespace: str = Field(
        default="intentd",
        description="Ray namespace of the slots, one a scheduler.",
        pattern=r"^[A-Za-z0-9_.\-]{1,64}$",
    )
    temp_dir: str = Field(
        default="",
        description="Where the daemon's own cluster keeps sockets and logs; short, for socket "
        "paths are at most 107 bytes. Empty: a directory of /tmp named after `state_dir`.",
        pattern="^(/.{0,40})?$",
    )
    work_dir: str = Field(
        default="",
        description="Where jobs run that name no directory: one that all nodes share. Empty: "
        "below `state_dir`.",
        pattern="^(/.*)?$",
    )
    object_store: Size = Field(
        default=80_000_000,
        description="Shared memory of each node of the daemon's own cluster.",
        ge=76 << 20,
    )
    heartbeat_s: Duration = Field(
        default=1.0, description="How often every GPU's slot is asked.", ge=0.1, le=60
    )
    lease_s: Duration = Field(
        default=10.0,
        description="A node that has heard neither from the daemon nor from Ray's head for so "
        "long ends what runs on it.",
        ge=1,
    )
    lost_after_s: Duration = Field(
        default=15.0,
        description="A node that is silent for so long is lost: its jobs start elsewhere. Must "
        "exceed `lease_s` by two heartbeats, so that nothing runs twice.",
        ge=1,
    )

    @model_validator(mode="after")
    def _check(self) -> RaySection:
        least = self.lease_s + 2 * self.heartbeat_s
        if self.lost_after_s < least:
            raise ConfigError("lost_after_s", self.lost_after_s, f"at least {least:g}")
        return self


class GpuConfig(DaemonConfig):
    """The GPU scheduler's file."""

    role: ClassVar[str] = "gpu"

    jobs: JobsSection = Field(default=JobsSection(), description="How jobs run.")
    ray: RaySection = Field(default=RaySection(), description="The Ray cluster.")
    costs: CostsSection = Field(default=CostsSection(), description="What changes cost.")
    output: OutputSection = Field(default=OutputSection(), description="Output and records.")
