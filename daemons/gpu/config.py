"""Configuration of intentd-gpu."""

from __future__ import annotations

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
        description="local: child processes on this host. sim: nothing runs, time passes.",
        pattern="^(local|sim)$",
    )
    nodes: tuple[NodeSection, ...] = Field(
        default=(NodeSection(name="local", gpus=1),),
        description="Nodes. With the local executor all are on this host.",
    )
    policy: str = Field(
        default="fifo", description="Until the controller says another: " + ", ".join(NAMES) + "."
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
        return [Node(node.name, node.gpus) for node in self.nodes]

    def rules(self, hold_growth_s: float) -> Rules:
        return Rules(
            quotas=self.quotas,
            default_size_gpu_s=self.default_size_gpu_s,
            max_jobs=self.max_jobs,
            hold_growth_s=hold_growth_s,
        )


class GpuConfig(DaemonConfig):
    """The GPU scheduler's file."""

    role: ClassVar[str] = "gpu"

    jobs: JobsSection = Field(default=JobsSection(), description="How jobs run.")
    costs: CostsSection = Field(default=CostsSection(), description="What changes cost.")
    output: OutputSection = Field(default=OutputSection(), description="Output and records.")
