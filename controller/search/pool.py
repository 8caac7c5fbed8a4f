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
from intentd.core.jobs.search_space import Evaluator, Space, evaluate_point

Array = NDArray[np.float64]
_task: tuple[Evaluator, Space] | None = None


class Pool(Protocol):
    """Evaluates points; order kept."""

    def map(self, points: Sequence[Array]) -> list[Array]: ...

    def close(self) -> None: ...


class LocalPool:
    """In this process: for one worker, and for tests."""

    def __init__(self, evaluate: Evaluator, space: Space) -> None:
        self._task = evaluate, space

    def map(self, points: Sequence[Array]) -> list[Array]:
        evaluate, space = self._task
        return [evaluate_point(evaluate, space.policy, x) for x in points]

    def close(self) -> None:
        """Nothing is held."""


def _start(evaluate: Evaluator, space: Space) -> None:
    global _task  # noqa: PLW0603  # a worker serves one search: its task is its state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to answer
    _task = evaluate, space


def _batch(points: list[Array]) -> list[Array]:
    assert _task is not None
    evaluate, space = _task
    return [evaluate_point(evaluate, space.policy, x) for x in points]


class ProcessPool:
    """Worker processes (spawned, so that a daemon's threads and sockets stay out of them)."""

    def __init__(self, evaluate: Evaluator, space: Space, workers: int) -> None:
        self._workers = workers
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(evaluate, space),
        )

    def map(self, points: Sequence[Array]) -> list[Array]:
        step = max(1, -(-len(points) // (4 * self._workers)))
        batches = [list(points[at : at + step]) for at in range(0, len(points), step)]
        return [values for batch in self._pool.map(_batch, batches) for values in batch]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class RayPool:
    """Tasks on a Ray cluster at an explicit address (a bare init would join any cluster)."""

    def __init__(self, evaluate: Evaluator, space: Space, address: str) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise InputError("ray", address, "Ray installed here (pip install ray)") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            self._ray.init(address=address, namespace="intentd-search", log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise IntentdError(f"ray: no cluster at {address} ({error})") from None
        self._task = self._ray.put((evaluate, space))
        self._run = self._ray.remote(_remote_batch)
        self._width = max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(self, points: Sequence[Array]) -> list[Array]:
        step = max(1, -(-len(points) // (4 * self._width)))
        batches = [list(points[at : at + step]) for at in range(0, len(points), step)]
        done = self._ray.get([self._run.remote(self._task, batch) for batch in batches])
        return [values for batch in done for values in batch]

    def close(self) -> None:
        self._ray.shutdown()


def _remote_batch(task: tuple[Evaluator, Space], points: list[Array]) -> list[Array]:
    evaluate, space = task
    return [evaluate_point(evaluate, space.policy, x) for x in points]


def open_pool(
    evaluate: Evaluator, space: Space, *, workers: int | None = None, ray: str | None = None
) -> Pool:
    """workers: None for one a core. ray: address of a cluster."""
    if ray is not None:
        return RayPool(evaluate, space, ray)
    count = workers if workers is not None else os.cpu_count() or 1
    if not 1 <= count <= 1024:
        raise InputError("workers", count, "1 to 1024 processes")
    return LocalPool(evaluate, space) if count == 1 else ProcessPool(evaluate, space, count)
