"""One interface between the controller and what it schedules: measure, compute, enforce.

Dissertation, section 2.4.3 and figure 2.4b: a scheduling application asks its environment for the
workload and the load, has thresholds and rates computed, and enforces them, each on a timer of its
own. Flows implement it in `controller.flows_app`; jobs and prompts implement the same six calls.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import StoreError

_log = logging.getLogger(__name__)

Workload = TypeVar("Workload")
Load = TypeVar("Load")
Thresholds = TypeVar("Thresholds")
Rates = TypeVar("Rates")


class SchedulingApplication(ABC, Generic[Workload, Load, Thresholds, Rates]):
    """What decides when to measure, compute and enforce for one environment.

    get_* and enforce_* run in the event loop; compute_* run in a thread, one at a time, and touch
    nothing the loop changes meanwhile.
    """

    name: ClassVar[str]

    @abstractmethod
    def get_workload_info(self) -> Workload:
        """What arrived since the last call."""

    @abstractmethod
    def get_class_load(self) -> Load:
        """The load of each class now."""

    @abstractmethod
    def compute_thresholds(self, workload: Workload) -> Thresholds:
        """Class borders for the workload, where they changed."""

    @abstractmethod
    def compute_rates(self, load: Load) -> Rates:
        """Weights of the classes, where they changed."""

    @abstractmethod
    async def enforce_thresholds(self, thresholds: Thresholds) -> None:
        """Take new borders into the policy in force."""

    @abstractmethod
    async def enforce_rates(self, rates: Rates) -> None:
        """Take new weights into the policy in force and issue it if it changed."""


class ApplicationTimers(Generic[Workload, Load, Thresholds, Rates]):
    """Runs one application: thresholds every few seconds, rates as often or more."""

    def __init__(
        self,
        application: SchedulingApplication[Workload, Load, Thresholds, Rates],
        clock: Clock,
        *,
        thresholds_interval_s: float,
        rates_interval_s: float,
    ) -> None:
        self._application = application
        self._clock = clock
        self._thresholds_interval_s = thresholds_interval_s
        self._rates_interval_s = rates_interval_s
        self._wake = asyncio.Event()
        self._failure = ""
        self.lock = asyncio.Lock()  # held during a step, and by the operator's changes
        self._thresholds_due_s = clock.now() + thresholds_interval_s

    def set_intervals(self, *, thresholds_interval_s: float, rates_interval_s: float) -> None:
        self._thresholds_interval_s = thresholds_interval_s
        self._rates_interval_s = rates_interval_s

    def wake(self) -> None:
        """Do the next step now: a domain appeared, or the operator changed something."""
        self._wake.set()

    async def run(self) -> None:
        """For ever, one step after the other."""
        while True:
            try:
                async with asyncio.timeout(self._rates_interval_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self.step()
            except StoreError as error:  # the store's owner says so in readiness; computed again
                if str(error) != self._failure:
                    _log.error("not issued", extra={"error": str(error)})
                self._failure = str(error)
            else:
                self._failure = ""

    async def step(self) -> None:
        """One turn: thresholds if they are due, then rates."""
        async with self.lock:
            await self._step()

    async def _step(self) -> None:
        application = self._application
        if self._clock.now() >= self._thresholds_due_s:
            self._thresholds_due_s = self._clock.now() + self._thresholds_interval_s
            workload = application.get_workload_info()
            thresholds = await asyncio.to_thread(application.compute_thresholds, workload)
            await application.enforce_thresholds(thresholds)
        load = application.get_class_load()
        rates = await asyncio.to_thread(application.compute_rates, load)
        await application.enforce_rates(rates)
