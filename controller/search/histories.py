"""Training and test histories of a search: what it may see, and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from intentd.core.errors import InputError
from intentd.core.jobs.allocator import JobTable
from intentd.core.jobs.workloads import resampled, synthetic

TEST_SEED = 1_000_003  # far from every training seed
JUDGE_SEED = 2_000_003
JUDGES = 8


@dataclass(frozen=True, slots=True)
class Histories:
    """The objectives are averaged over train; judge, drawn like it, decides between the points of
    two searches (a warm start); test is measured once, at the end."""

    train: tuple[JobTable, ...]
    test: tuple[JobTable, ...]
    judge: tuple[JobTable, ...] = ()


def of_workload(
    name: str, *, jobs: int, load: float, gpus: float, seed: int, samples: int
) -> Histories:
    """Fresh draws of a synthetic workload on both sides."""
    _check(samples)
    draws = [
        synthetic(name, jobs=jobs, load=load, gpus=gpus, seed=seed + step)
        for step in (
            *range(samples),
            *range(TEST_SEED, TEST_SEED + samples),
            *range(JUDGE_SEED, JUDGE_SEED + JUDGES),
        )
    ]
    return Histories(
        tuple(draws[:samples]), tuple(draws[samples : 2 * samples]), tuple(draws[2 * samples :])
    )


def of_trace(
    trace: JobTable, *, jobs: int, seed: int, samples: int, whole: bool = False
) -> Histories:
    """The first half resampled (blocks of about ``jobs`` arrivals) against the second half.

    whole: train on the trace itself and test on nothing, to compare with figures published for
    configurations that were found so.
    """
    _check(samples)
    if whole:
        return Histories((trace,), ())
    half = len(trace) // 2
    if half < 10:
        raise InputError("trace", len(trace), "at least 20 jobs, to keep half for the test")
    train = trace.take(slice(0, half))
    draws, judge = (
        tuple(resampled(train, jobs, seed + step) for step in steps)
        for steps in (range(samples), range(JUDGE_SEED, JUDGE_SEED + JUDGES))
    )
    return Histories(draws, (second_half(trace),), judge)


def second_half(trace: JobTable) -> JobTable:
    """The later half of the arrivals, on a cluster that is empty when it begins."""
    return trace.take(slice(len(trace) // 2, None))


def _check(samples: int) -> None:
    if not 1 <= samples <= 100:
        raise InputError("samples", samples, "1 to 100 training histories")
