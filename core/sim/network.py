"""A network that loses, delays, repeats, reorders and cuts, all from one seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from intentd.core.sim.engine import Engine


@dataclass(frozen=True, slots=True)
class Weather:
    """How the network treats messages. Delays are uniform in delay_s; with probability spike a
    message takes up to spike_s more, and so is overtaken by later ones. loss, repeat: in [0, 1).
    """

    loss: float = 0.0
    repeat: float = 0.0
    delay_s: tuple[float, float] = (0.00005, 0.0004)
    spike: float = 0.0
    spike_s: float = 0.05


CALM = Weather()


class Network:
    """Carries bytes between named nodes; ``send`` decides the fate of each message at once."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine = engine
        self.weather = CALM
        self.lost = 0
        self.cut_off = 0
        self._rng = rng
        self._cuts: dict[tuple[str, str], int] = {}

    def send(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """Call deliver once, twice, late or never."""
        if source == target:
            self.engine.after(0.00002, deliver)
            return
        if self._cuts.get((source, target)):
            self.cut_off += 1
            return
        weather, rng = self.weather, self._rng
        if weather.loss and rng.random() < weather.loss:
            self.lost += 1
            return
        self.engine.after(self._delay_s(), deliver)
        if weather.repeat and rng.random() < weather.repeat:
            self.engine.after(self._delay_s(), deliver)

    def cut(self, source: str, target: str) -> None:
        """Nothing goes from source to target until mend; cuts of the same pair add up."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1

    def mend(self, source: str, target: str) -> None:
        left = self._cuts.get((source, target), 0) - 1
        if left > 0:
            self._cuts[source, target] = left
        else:
            self._cuts.pop((source, target), None)

    def _delay_s(self) -> float:
        weather, rng = self.weather, self._rng
        delay_s = rng.uniform(*weather.delay_s)
        if weather.spike and rng.random() < weather.spike:
            delay_s += rng.random() * weather.spike_s
        return delay_s
