"""Where evaluations run: in this process, in worker processes, or on a Ray cluster."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError, IntentdError
from intentd.core.jobs.policy import JobsPolicy
from intentd.core.jobs.search_space import Evaluator, Space, evaluate_point
from intentd.daemons.kit.reach import require_listener

Array = NDArray[np.float64]
Candidate = Array | JobsPolicy
Task = tuple[tuple[Evaluator, ...], Space]
_task: Task | None = None


class Pool(Protocol):
    """Evaluates points, or policies; order kept. which: by which of its evaluators."""

    def map(self, points: Sequence[Candidate], which: int = 0) -> list[Array]: ...

    def close(self) -> None: ...


class LocalPool:
    """In this process: for one worker, and for tests."""

    def __init__(self, evaluators: Sequence[Evaluator], space: Space) -> None:
        self._task: Task = tuple(evaluators), space

    def map(self, points: Sequence[Candidate], which: int = 0) -> list[Array]:
        return _evaluated(self._task, list(points), which)

    def close(self) -> None:
        """Nothing is held."""


def _evaluated(task: Task, points: list[Candidate], which: int) -> list[Array]:
    evaluators, space = task
    return [
        np.array(evaluators[which](x))
        if isinstance(x, JobsPolicy)
        else evaluate_point(evaluators[which], space.policy, x)
        for x in points
    ]


def _start(task: Task) -> None:
    global _task  # noqa: PLW0603  # a worker serves one search: its task is its state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to answer
    _task = task


def _batch(points: list[Candidate], which: int) -> list[Array]:
    assert _task is not None
    return _evaluated(_task, points, which)


class ProcessPool:
    """Worker processes (spawned, so that a daemon's threads and sockets stay out of them)."""

    def __init__(self, evaluators: Sequence[Evaluator], space: Space, workers: int) -> None:
        self._workers = workers
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=((tuple(evaluators), space),),
        )

    def map(self, points: Sequence[Candidate], which: int = 0) -> list[Array]:
        step = max(1, -(-len(points) // (4 * self._workers)))
        batches = [list(points[at : at + step]) for at in range(0, len(points), step)]
        done = self._pool.map(_batch, batches, [which] * len(batches))
        return [values for batch in done for values in batch]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class RayPool:
    """Tasks on a Ray cluster at an explicit address (a bare init would join any cluster)."""

    def __init__(self, evaluators: Sequence[Evaluator], space: Space, address: str) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise InputError("ray", address, "Ray installed here (pip install ray)") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            require_listener(address)  # Ray would try for minutes
            self._ray.init(address=address, namespace="intentd-search", log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise IntentdError(f"ray: no cluster at {address} ({error})") from None
        self._task = self._ray.put((tuple(evaluators), space))
        self._run = self._ray.remote(_evaluated)
        self._width = max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(self, points: Sequence[Candidate], which: int = 0) -> list[Array]:
        step = max(1, -(-len(points) // (4 * self._width)))
        batches = [list(points[at : at + step]) for at in range(0, len(points), step)]
        done = self._ray.get([self._run.remote(self._task, batch, which) for batch in batches])
        return [values for batch in done for values in batch]

    def close(self) -> None:
        self._ray.shutdown()


def open_pool(
    evaluators: Sequence[Evaluator],
    space: Space,
    *,
    workers: int | None = None,
    ray: str | None = None,
) -> Pool:
    """workers: None for one a core. ray: address of a cluster."""
    if ray is not None:
        return RayPool(evaluators, space, ray)
    count = workers if workers is not None else os.cpu_count() or 1
    if not 1 <= count <= 1024:
        raise InputError("workers", count, "1 to 1024 processes")
    if count == 1:
        return LocalPool(evaluators, space)
    return ProcessPool(evaluators, space, count)
