"""What every experiment can be told, and the list of experiments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.testbed.lab import Setup

# Module name -> what it shows.
EXPERIMENTS: Final = {
    "overall": "each workload under each policy, beside the simulator on the same trace",
    "cluster_reuse": "the workload changes twice during the run, the controller learns",
    "mixed": "two workloads at once: learned classes against those of either workload",
    "load": "2D, PS and FIFO from 20 to 90 % load",
    "global_order": "several client hosts: sequencer, one shared gate, independent gates",
    "downlink": "two senders, one receiver's downlink",
    "faults": "kill -9 of each daemon in turn under load",
}
GATES: Final = ("agent", "local")


NO_BOTTLENECK: Final = (
    "The loopback is not shaped and carries many times the load: flows that start at once (PS) "
    "hardly slow each other down there, while those that take turns still wait. These are times of "
    "the gate; what 2D gains at a bottleneck shows in namespaces, as root."
)


@dataclass(frozen=True, slots=True)
class Options:
    """Empty workloads, policies and loads, and a duration or seeds of 0, mean the experiment's own.

    gate: "agent" plays through the host's agent; "local" has the same gate in the client's process.
    namespaces False: on the loopback, unshaped. early_fin_bytes: a turn is announced when so much
    of its flow is left (0: when it has ended; None: as the controller has it). rounds: kills, for
    faults. repeats: how often a run is played again that the host of a virtual machine disturbed
    (``lab.STEAL_AT_MOST``).
    """

    workloads: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    loads: tuple[float, ...] = ()
    duration_s: float = 0.0
    seeds: int = 0
    first_seed: int = 1
    rate_bps: float = 1e9
    scale: float | None = None
    gate: str = "agent"
    namespaces: bool = True
    ipv6: bool = False
    rounds: int = 0
    early_fin_bytes: int | None = None
    repeats: int = 0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise InputError("gate", self.gate, f"one of {', '.join(GATES)}")
        if self.seeds < 0 or self.first_seed < 0 or self.rounds < 0:
            raise InputError("seeds", self.seeds, "numbers >= 0")
        if not 0 <= self.repeats <= 100:
            raise InputError("repeats", self.repeats, "0 to 100")
        if not 0 <= self.duration_s <= 86_400:
            raise InputError("duration", self.duration_s, "seconds, at most a day")
        if not 1e6 <= self.rate_bps <= 1e11:
            raise InputError("rate", self.rate_bps, "1 Mbit to 100 Gbit a second")
        if not 0 <= (self.early_fin_bytes or 0) <= 1 << 30:
            raise InputError("early_fin", self.early_fin_bytes, "bytes, at most 1 GiB")
        for load in self.loads:
            if not 0 < load < 1:
                raise InputError("load", load, "a share of the link in (0, 1)")

    def seed_range(self, default: int) -> range:
        return range(self.first_seed, self.first_seed + (self.seeds or default))

    def setup(self) -> Setup:
        """One client host and one server; experiments that need more replace it."""
        return Setup(
            rate_bps=self.rate_bps,
            gate=self.gate,
            namespaces=self.namespaces,
            ipv6=self.ipv6,
            repeats=self.repeats,
        )

    def to_plain(self) -> dict[str, Any]:
        """What was asked for; the experiment adds what it chose itself."""
        return {name: value for name, value in asdict(self).items() if value not in (None, 0, ())}

    def notes(self) -> list[str]:
        """What a reader has to know before the figures."""
        if self.namespaces:
            return []
        return [NO_BOTTLENECK]
