"""The controller's end of a search that runs in a process of its own (``worker``).

Without pymoo, which only that process needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from intentd.core.errors import IntentdError
from intentd.core.jobs.allocator import JobTable, job_table
from intentd.core.jobs.policy import Costs, JobsPolicy, to_plain

MAX_LINE: Final = 64 << 20  # a front of many points with many classes
PATIENCE_S: Final = 60.0  # beyond twice the budget: start-up, the last batch, the test


def table_to_plain(table: JobTable) -> dict[str, Any]:
    names = ("submit_s", "work_gpu_s", "largest", "table", "smallest", "estimate")
    plain = {name: getattr(table, name).tolist() for name in names}
    return {**plain, "speeds": table.speeds.tolist()}


def table_from_plain(plain: Mapping[str, Any]) -> JobTable:
    return job_table(
        plain["submit_s"],
        plain["work_gpu_s"],
        plain["largest"],
        plain["table"],
        np.array(plain["speeds"]),
        smallest=np.array(plain["smallest"]),
        estimate=np.array(plain["estimate"]),
    )


def search_job(
    table: JobTable,
    *,
    gpus: float,
    objectives: Sequence[str],
    present: JobsPolicy | None = None,
    warm: Sequence[JobsPolicy] = (),
    costs: Costs | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What ``run`` takes. settings: sample_jobs, samples, seed, evaluations, seconds, algorithm,
    space, workers, predictions. present: the policy in force, measured beside the front."""
    chosen = costs or Costs()
    return {
        "table": table_to_plain(table),
        "gpus": gpus,
        "objectives": list(objectives),
        "present": None if present is None else to_plain(present),
        "warm": [to_plain(policy) for policy in warm],
        "costs": {name: getattr(chosen, name) for name in Costs.__slots__},
        **settings,
    }


class SearchProcess:
    """At most one search at a time. States: idle -> running -> idle."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self.done = 0
        self.total = 0

    @property
    def running(self) -> bool:
        return self._process is not None

    async def search(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The search's document. Raises IntentdError; kills the process when cancelled."""
        if importlib.util.find_spec("pymoo") is None:
            raise IntentdError("search: pymoo is not installed: pip install 'intentd[controller]'")
        self.done, self.total = 0, int(job["evaluations"])
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "intentd.controller.search.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            start_new_session=True,  # so that its own workers end with it
        )
        self._process = process
        try:
            async with asyncio.timeout(2 * float(job["seconds"]) + PATIENCE_S):
                return await self._follow(process, job)
        except TimeoutError:
            raise IntentdError("search: took far longer than its budget; ended") from None
        finally:
            self._process = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _follow(
        self, process: asyncio.subprocess.Process, job: Mapping[str, Any]
    ) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(json.dumps(dict(job)).encode() + b"\n")
            await process.stdin.drain()
        async for line in process.stdout:
            said = json.loads(line)
            if "done" in said:
                self.done, self.total = said["done"], said["total"]
            elif "result" in said:
                result: dict[str, Any] = said["result"]
                return result
            else:
                raise IntentdError(f"search: {said['error']}")
        raise IntentdError(f"search: its process ended with status {await process.wait()}")

    def cancel(self) -> bool:
        """Ends the search with what it found so far. False if none runs."""
        process = self._process
        if process is None or process.stdin is None:
            return False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(b"cancel\n")
        return True
