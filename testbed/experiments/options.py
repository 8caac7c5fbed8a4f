"""What every experiment can be told, and the list of experiments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.flows.policies import POLICIES
from intentd.testbed.lab import Setup
from intentd.testbed.policies import scaled_workload

MANY: Final = 100

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


OPTION_OF: Final = {
    "workloads": "--workload",
    "policies": "--policies",
    "loads": "--load",
    "seeds": "--seeds",
    "rounds": "--rounds",
    "early_fin_bytes": "--early-fin",
}


@dataclass(frozen=True, slots=True)
class Takes:
    """What of the options an experiment heeds; the rest is refused.

    workloads: fewest and most; policies, seeds, early_fin, rounds: whether; loads: most.
    live: needs the daemons (gate "agent"); namespaces: needs those.
    """

    workloads: tuple[int, int] = (1, MANY)
    policies: bool = False
    loads: int = 1
    seeds: bool = True
    early_fin: bool = False
    rounds: bool = False
    live: bool = False
    namespaces: bool = False


TAKES: Final = {
    "overall": Takes(policies=True, early_fin=True),
    "cluster_reuse": Takes(workloads=(2, MANY), live=True),
    "mixed": Takes(workloads=(2, MANY), policies=True),
    "load": Takes(policies=True, loads=MANY, early_fin=True),
    "global_order": Takes(live=True),
    "downlink": Takes(workloads=(1, 1), seeds=False, live=True, namespaces=True),
    "faults": Takes(workloads=(1, 1), seeds=False, rounds=True, live=True, namespaces=True),
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


def not_taken(name: str, options: Options) -> dict[str, InputError]:
    """Field of the options -> why the experiment cannot heed what it was told there."""
    takes = TAKES[name]
    few, most = takes.workloads
    given = {
        "workloads": ",".join(options.workloads),
        "policies": ",".join(options.policies),
        "loads": ",".join(f"{load:g}" for load in options.loads),
        "seeds": options.seeds,
        "rounds": options.rounds,
        "early_fin_bytes": options.early_fin_bytes,
    }
    counted = f"{few} of them for {name}" if few == most else f"{few} or more of them for {name}"
    nothing = f"nothing: not taken by {name}"
    wrong = {
        "workloads": counted if not few <= len(options.workloads or "*" * few) <= most else "",
        "policies": nothing if options.policies and not takes.policies else "",
        "loads": f"one of them for {name}" if len(options.loads) > takes.loads else "",
        "seeds": f"{nothing} (--first-seed is)" if options.seeds and not takes.seeds else "",
        "rounds": nothing if options.rounds and not takes.rounds else "",
        "early_fin_bytes": nothing
        if options.early_fin_bytes is not None and not takes.early_fin
        else "",
    }
    return {
        field: InputError(OPTION_OF[field], given[field], expected)
        for field, expected in wrong.items()
        if expected
    }


def check_values(options: Options) -> None:
    """Workloads are there and policies known: nothing is started for those that are not. Raises
    InputError."""
    for name in options.workloads:
        scaled_workload(name, options.scale)
    for name in options.policies:
        if name not in POLICIES:
            raise InputError("--policies", name, f"one of {', '.join(POLICIES)}")


def check_place(name: str, options: Options) -> None:
    """Raises InputError where the experiment cannot run."""
    takes = TAKES[name]
    if takes.live and options.gate != "agent":
        raise InputError("--gate", options.gate, f"agent: {name} needs the daemons")
    if takes.namespaces and not options.namespaces:
        raise InputError("namespaces", "the loopback", f"root: {name} needs network namespaces")
