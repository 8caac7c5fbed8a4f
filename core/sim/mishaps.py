"""What goes wrong in a simulation of faults, drawn from its seed: deaths, pauses, cuts, loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from intentd.core.sim.network import CALM, Weather

if TYPE_CHECKING:
    from intentd.core.sim.faults import Simulation

SEQUENCER: Final = "sequencer"
LONGEST_RESTART_S: Final = 1.2  # longer than a lease, and nobody waits for max_wait behind it


class Mishaps:
    """Plans the faults of one simulation. max_pause_s: the longest that a process is stopped."""

    def __init__(self, sim: Simulation, max_pause_s: float) -> None:
        self.sim = sim
        self.rng = sim.rng
        self.max_pause_s = max_pause_s

    def plan(self, start: float, end: float) -> None:
        """Draw what goes wrong between start and end, on the engine's clock."""
        rng, faults = self.rng, self.sim.faults
        if faults.loss:
            rough = Weather(loss=faults.loss, repeat=0.1, spike=0.1)
            self.sim.engine.at(start, lambda: setattr(self.sim.network, "weather", rough))
        kinds: list[Callable[[float, float], None]] = []
        if faults.kill:
            kinds += [self.kill_agent, self.crash_sequencer, self.pause_agent, self.pause_sequencer]
        if faults.partition:
            kinds += [self.cut_agent, self.cut_from_sequencer, self.cut_datagrams]
        if faults.restart:
            kinds += [self.restart_sequencer] * (2 if kinds else 1)
        for _ in range(rng.randint(1, 4) if kinds else 0):
            begin = rng.uniform(start, end - 0.2)
            rng.choice(kinds)(begin, rng.uniform(begin + 0.05, end))
        self.sim.engine.at(end, self.heal)

    def heal(self) -> None:
        self.sim.network.weather = CALM
        self.sim.note("healed")

    def kill_agent(self, begin: float, end: float) -> None:
        agent = self.rng.choice(self.sim.agents)

        def kill() -> None:
            self.sim.note(f"{agent.name} killed")
            if agent.alive:
                agent.kill()

        def boot() -> None:
            self.sim.note(f"{agent.name} starts again")
            if not agent.alive:
                agent.boot()

        self.sim.engine.at(begin, kill)
        self.sim.engine.at(end, boot)

    def crash_sequencer(self, begin: float, end: float) -> None:
        def boot() -> None:
            if self.sim.core is None:
                self.sim.start_sequencer()

        self.sim.engine.at(begin, self.sim.kill_sequencer)
        self.sim.engine.at(end, boot)

    def restart_sequencer(self, begin: float, end: float) -> None:
        def boot() -> None:
            if self.sim.core is None:
                self.sim.start_sequencer()

        self.sim.engine.at(begin, self.sim.stop_sequencer)
        self.sim.engine.at(min(end, begin + LONGEST_RESTART_S), boot)

    def pause_agent(self, begin: float, end: float) -> None:
        agent = self.rng.choice(self.sim.agents)

        def pause() -> None:
            self.sim.note(f"{agent.name} pauses")
            agent.pause()

        def resume() -> None:
            self.sim.note(f"{agent.name} resumes")
            agent.resume()

        self.sim.engine.at(begin, pause)
        self.sim.engine.at(min(end, begin + self.max_pause_s), resume)

    def pause_sequencer(self, begin: float, end: float) -> None:
        def pause() -> None:
            self.sim.note("sequencer pauses")
            self.sim.sequencer_paused = True

        self.sim.engine.at(begin, pause)
        self.sim.engine.at(end, self.sim.resume_sequencer)

    def cut_agent(self, begin: float, end: float) -> None:
        agent = self.rng.choice(self.sim.agents)
        others = [other.name for other in self.sim.agents if other is not agent]
        self._cut(agent.name, [SEQUENCER, *others], begin, end)

    def cut_from_sequencer(self, begin: float, end: float) -> None:
        self._cut(self.rng.choice(self.sim.agents).name, [SEQUENCER], begin, end)

    def cut_datagrams(self, begin: float, end: float) -> None:
        agent = self.rng.choice(self.sim.agents)
        others = [other.name for other in self.sim.agents if other is not agent]
        self._cut(agent.name, others, begin, end)

    def _cut(self, name: str, others: list[str], begin: float, end: float) -> None:
        one_way = self.rng.random() < 0.3
        pairs = [(name, other) for other in others]
        if not one_way:
            pairs += [(other, name) for other in others]

        def cut() -> None:
            self.sim.note(f"cut {name} from {', '.join(others)}{' (one way)' if one_way else ''}")
            for pair in pairs:
                self.sim.network.cut(*pair)

        def mend() -> None:
            self.sim.note(f"mended {name}")
            for pair in pairs:
                self.sim.network.mend(*pair)

        self.sim.engine.at(begin, cut)
        self.sim.engine.at(end, mend)
