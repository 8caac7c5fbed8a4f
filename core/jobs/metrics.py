"""What the chapter measures: JCT, prediction error, unfairness (sections 3.2.2 and 3.5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError
from intentd.core.jobs.allocator import JobTable, Outcome

Array = NDArray[np.float64]
METRICS: Final = ("jct", "prederr", "unfairness")


def prediction_error(jct_s: Array, predicted_s: Array) -> Array:
    """Signed, in percent of the prediction: (JCT - predicted) / predicted.

    The magnitude is bounded by 100 for predictions that were too long and unbounded for those too
    short, so that it can be gamed by inflating predictions: read it beside the signed mean.
    """
    return np.asarray(100.0 * (jct_s - predicted_s) / np.maximum(predicted_s, 1e-9))


@dataclass(frozen=True, slots=True)
class Measured:
    """Per job, in arrival order; NaN where a job was not predicted or did not finish."""

    jct_s: Array
    predicted_s: Array
    error_percent: Array  # signed
    unfairness: Array  # max(0, JCT / fair - 1)
    slowdown: Array  # JCT over the time alone on the cluster

    @classmethod
    def of(cls, jobs: JobTable, outcome: Outcome) -> Measured:
        jct = outcome.finish_s - jobs.submit_s
        predicted = outcome.predicted_s - jobs.submit_s
        alone = jobs.work_gpu_s / jobs.speeds[jobs.table, jobs.largest]
        return cls(
            jct,
            predicted,
            prediction_error(jct, predicted),
            np.maximum(0.0, jct / outcome.fair_s - 1.0),
            jct / alone,
        )


@dataclass(frozen=True, slots=True)
class Objective:
    """<metric, measure> of the preference interface (section 3.3.2); smaller is better.

    metric: jct, prederr or unfairness. percentile: None for the average.
    """

    metric: str
    percentile: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """``jct:avg``, ``prederr:p99``. Raises InputError."""
        metric, _, measure = text.strip().partition(":")
        expected = f"{'|'.join(METRICS)}:avg|p<percentile>, such as prederr:p99"
        if metric not in METRICS:
            raise InputError("objectives", text, expected)
        if measure == "avg":
            return cls(metric)
        try:
            percentile = float(measure[1:]) if measure.startswith("p") else math.nan
        except ValueError:
            percentile = math.nan
        if not 0 < percentile <= 100:
            raise InputError("objectives", text, expected)
        return cls(metric, percentile)

    @property
    def name(self) -> str:
        return f"{self.metric}:{'avg' if self.percentile is None else f'p{self.percentile:g}'}"

    def of(self, measured: Measured) -> float:
        """The value over all jobs that have one; infinite if none has."""
        values = {
            "jct": measured.jct_s,
            "prederr": np.abs(measured.error_percent),
            "unfairness": measured.unfairness,
        }[self.metric]
        return summarised(values, self.percentile)


def summarised(values: Array, percentile: float | None = None) -> float:
    """Mean or percentile of the finite values; infinite if there are none."""
    known = values[np.isfinite(values)]
    if known.size == 0:
        return math.inf
    if percentile is None:
        return float(np.mean(known))
    return float(np.percentile(known, percentile))


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """``"jct:avg,prederr:avg"``; repeats of a metric under other measures are welcome."""
    objectives = tuple(Objective.parse(part) for part in text.split(",") if part.strip())
    if len(objectives) < 2 or len(set(objectives)) != len(objectives):
        raise InputError("objectives", text, "two or more different objectives")
    return objectives
