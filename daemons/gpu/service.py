"""What users can ask of the scheduler, whichever door they come by (admin socket or HTTP)."""

from __future__ import annotations

import asyncio
import math
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from intentd.core.errors import InputError, IntentdError
from intentd.core.jobs.job import OVER, Instruction, Job, State
from intentd.core.jobs.ledger import Ledger
from intentd.core.jobs.predictor import Prediction
from intentd.core.jobs.spec import MAX_ARRAY, JobSpec, spec_from_plain
from intentd.daemons.gpu.outputs import Kept, decode, read_output
from intentd.daemons.gpu.scheduler import Scheduler

MAX_PAGE: Final = 10_000
MAX_LOG_BYTES: Final = 1 << 20


class UnknownJobError(IntentdError):
    """There is no such job, or none that this user may see."""


class NotAllowedError(IntentdError):
    """The job is somebody else's."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a user of this host, or a token's holder by the token's name.

    trusted: the daemon's own user, root, an admin's token: may name an owner and sees everything.
    operates: may drain nodes.
    """

    name: str
    trusted: bool
    operates: bool = False


class Service:
    """profiles: named speed tables of the configuration. multi_user: jobs run as their owners."""

    def __init__(
        self,
        scheduler: Scheduler,
        profiles: Mapping[str, tuple[float, ...]],
        *,
        multi_user: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.profiles = profiles
        self.multi_user = multi_user

    async def submit(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """args: the fields of a job, and ``array``: how many of it."""
        given = dict(args)
        count = _array(given)
        if count:
            specs = [self._spec({**given, "array_index": i}, caller) for i in range(count)]
        else:
            specs = [self._spec(given, caller)]
        jobs = await self.scheduler.submit(specs)
        warnings = specs[0].function(1.0).warnings
        return {
            "jobs": [job.id for job in jobs],
            "job": jobs[0].id,
            "predicted": self._prediction(self.scheduler.predictor.issued.get(jobs[0].id)),
            "warnings": list(warnings),
        }

    async def predict(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """The prediction of a job that is not submitted, or of the last of an array to end, and its
        effect on the others."""
        given = {"command": ["none"], **args}
        count = _array(given)
        prediction, delays, pool = await self.scheduler.what_if(
            self._spec(given, caller), max(1, count)
        )
        late = {job: round(by, 3) for job, by in delays.items() if abs(by) > 0.5}
        return {
            "predicted": self._prediction(prediction),
            "gpu_type": pool,
            "delayed_jobs": len(late),
            "largest_delay_s": max(late.values(), default=0.0),
            "delays_s": dict(sorted(late.items(), key=lambda item: -item[1])[:50]),
        }

    async def list_jobs(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Newest first. args: state (list), owner, name, label (name=value or name), array (the
        number of a job: all that were submitted with it), before, limit. ``next``: what to give as
        before for the rest, 0 if this was all."""
        states = args.get("state") or []
        states = [states] if isinstance(states, str) else list(states)
        known = [state.value for state in State]
        for at, state in enumerate(states):
            if state == "unfinished":
                continue
            if state not in known:
                raise InputError(f"state[{at}]", state, f"unfinished, {', '.join(known)}")
        if "unfinished" in states:
            states += [state.value for state in State if state not in OVER]
        limit = _number(args, "limit", 100, 1, MAX_PAGE)
        rows = await asyncio.to_thread(  # a search by label looks at every job
            self.scheduler.store.page,
            states=[state for state in states if state != "unfinished"],
            owner=str(args.get("owner", "")),
            name=str(args.get("name", "")),
            label=str(args.get("label", "")),
            array=_number(args, "array", 0, 0, 2**53),
            before=_number(args, "before", 0, 0, 2**53),
            limit=limit + 1,
        )
        return {
            "jobs": [self._row(row) for row in rows[:limit]],
            "next": rows[limit - 1]["id"] if len(rows) > limit else 0,
        }

    def show(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        row = self._find(args)
        shown = self._row(row)
        spec = dict(row["spec"])
        if not self._may(row, caller):
            spec["env"] = dict.fromkeys(spec["env"], "(hidden)")
            spec["command"] = [spec["command"][0], "(hidden)"]
        predictions = self.scheduler.store.predictions(row["id"])
        return {
            **shown,
            "spec": spec,
            "devices": row["devices"],
            "detail": row["detail"],
            "exit_status": row["exit_status"],
            "resized": row["resized"],
            "preempted": row["preempted"],
            "lost": row["lost"],
            "worked_gpu_s": row["worked_gpu_s"],
            "predictions": predictions,
        }

    def events(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """args: job (all if absent), after, limit."""
        job = _number(args, "job", 0, 0, 2**53)
        after = _number(args, "after", 0, 0, 2**53)
        limit = _number(args, "limit", 1000, 1, MAX_PAGE)
        return {"events": self.scheduler.store.events(job, after, limit)}

    def explain(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """One sentence and its numbers, and the story so far."""
        row = self._find(args)
        ledger = self.scheduler.ledger
        if row["id"] in ledger.jobs:
            reason = ledger.reason(row["id"])
        else:
            reason = {"state": row["state"], "text": row["detail"]}
        predictions = self.scheduler.store.predictions(row["id"])
        events = self.scheduler.store.events(row["id"], 0, 200)
        return {"job": row["id"], **reason, "predictions": predictions[-10:], "events": events}

    async def cancel(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        row = self._find(args)
        if not self._may(row, caller):
            raise NotAllowedError(f"job {row['id']}: belongs to {row['spec']['owner']}")
        if row["state"] in {state.value for state in OVER}:
            raise InputError("job", row["id"], f"an unfinished job: it is {row['state']}")

        def cancel(ledger: Ledger, now: float) -> tuple[None, list[Instruction]]:
            return None, ledger.cancel(row["id"], now, f"asked by {caller.name or 'a user'}")

        await self.scheduler.change(cancel, f"job {row['id']} cancelled")
        return {"job": row["id"]}

    def logs(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """A piece of a job's output. args: offset (bytes since the job's first; negative: from the
        end), limit. Its owner and the trusted alone. ``dropped``: bytes from the offset on that are
        no longer kept; ``next``: the offset to ask for then; ``end``: bytes written so far. Pieces
        end between characters: one cut short waits for its rest, or for the job's end."""
        row = self._find(args)
        if not self._may(row, caller):
            raise NotAllowedError(f"job {row['id']}: belongs to {row['spec']['owner']}")
        offset = _number(args, "offset", 0, -(2**53), 2**53)
        limit = _number(args, "limit", MAX_LOG_BYTES, 1, MAX_LOG_BYTES)
        executor = self.scheduler.executor
        path = executor.output(row["id"]) if executor is not None else None
        kept = read_output(path, offset, limit) if path is not None else Kept(b"", 0, 0)
        over = row["state"] in {state.value for state in OVER}
        at_end = kept.at + len(kept.data) >= kept.end
        text, used = decode(kept.data, final=over and at_end)
        return {
            "text": text,
            "offset": kept.at,
            "next": kept.at + used,
            "dropped": max(0, kept.at - offset) if offset >= 0 else 0,
            "end": kept.end,
            "state": row["state"],
        }

    def nodes(self) -> dict[str, Any]:
        ledger = self.scheduler.ledger
        used = dict.fromkeys(ledger.nodes, 0)
        for job in ledger.jobs.values():
            for name, gpus in job.placement.items():
                used[name] = used.get(name, 0) + gpus
        return {
            "nodes": [
                {
                    "name": node.name,
                    "gpus": node.gpus,
                    "gpu_type": node.gpu_type,
                    "used_gpus": used[node.name],
                    "drained": node.drained,
                    "lost": node.name in ledger.lost,
                }
                for node in ledger.nodes.values()
            ]
        }

    async def drain(self, args: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """args: node, evict, undo."""
        unknown = sorted(set(args) - {"node", "evict", "undo"})
        if unknown:
            raise InputError(unknown[0][:80], args[unknown[0]], "one of evict, node, undo")
        if not (caller.trusted or caller.operates):
            raise NotAllowedError("drain: for operators alone")
        name = str(args.get("node", ""))
        undo, evict = _flag(args, "undo"), _flag(args, "evict")

        def drain(ledger: Ledger, now: float) -> tuple[None, list[Instruction]]:
            if undo:
                ledger.undrain(name)
            else:
                ledger.drain(name, now, evict=evict)
            drained = [node.name for node in ledger.nodes.values() if node.drained]
            self.scheduler.set_fact("drained", drained)
            return None, []

        await self.scheduler.change(drain, f"node {name} {'undrained' if undo else 'drained'}")
        return self.nodes()

    # -- inside --------------------------------------------------------------------------------

    def _spec(self, given: Mapping[str, Any], caller: Caller) -> JobSpec:
        if given.get("profile") and given.get("speeds"):
            raise InputError("speeds", "(a table)", "profile alone")
        asked = given.get("owner", "")
        if asked and asked != caller.name and not caller.trusted:
            raise InputError("owner", asked, f"{caller.name}, the user who asks")
        spec = spec_from_plain({**given, "owner": asked or caller.name}, self.profiles)
        if self.multi_user:
            _check_account(spec.owner)
        elif spec.workdir and not Path(spec.workdir).is_dir():
            raise InputError("workdir", spec.workdir, "a directory of this host")
        return spec

    def _find(self, args: Mapping[str, Any]) -> dict[str, Any]:
        number = args.get("job")
        if isinstance(number, bool) or not isinstance(number, int):
            raise InputError("job", number, "the number of a job")
        row = self.scheduler.store.job(number)
        if row is None:
            raise UnknownJobError(f"job {number}: unknown")
        return row

    @staticmethod
    def _may(row: Mapping[str, Any], caller: Caller) -> bool:
        return caller.trusted or (bool(caller.name) and row["spec"]["owner"] == caller.name)

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        scheduler = self.scheduler
        live: Job | None = scheduler.ledger.jobs.get(row["id"])
        left = scheduler.ledger.left(live) if live is not None else 0.0
        size = row["size_gpu_s"]
        return {
            "job": row["id"],
            "name": row["spec"]["name"],
            "owner": row["spec"]["owner"],
            "array_index": row["spec"]["array_index"],
            "state": row["state"],
            "gpus": sum(len(indices) for indices in row["devices"].values()),
            "min_gpus": row["spec"]["min_gpus"],
            "max_gpus": row["spec"]["max_gpus"],
            "labels": row["spec"]["labels"],
            "gpu_type": row.get("pool", ""),
            "epoch": row["epoch"],
            "size_gpu_s": size,
            "done_percent": _done_percent(row, left if live else None),
            "submitted_s": row["submitted_s"],
            "started_s": row["started_s"],
            "ended_s": row["ended_s"],
            "predicted": self._prediction(scheduler.predictor.issued.get(row["id"])),
        }

    @staticmethod
    def _prediction(prediction: Prediction | None) -> dict[str, Any] | None:
        if prediction is None:
            return None
        coverage = prediction.coverage_percent
        return {
            "p50_s": prediction.p50_s,
            "p90_s": prediction.p90_s,
            "in_p50_s": prediction.p50_s - prediction.at_s,
            "in_p90_s": prediction.p90_s - prediction.at_s,
            "made_s": prediction.at_s,
            "size_class": prediction.size_class,
            "coverage_percent": None if math.isnan(coverage) else coverage,
            "cause": prediction.cause,
        }


def _done_percent(row: Mapping[str, Any], left_gpu_s: float | None) -> float:
    """Of its size. left_gpu_s: None for a job that is over."""
    if row["state"] == State.FINISHED.value:
        return 100.0
    size = row["size_gpu_s"]
    done = row["done_gpu_s"] if left_gpu_s is None else size - left_gpu_s
    return round(100 * min(1.0, max(0.0, done / size)), 1) if size > 0 else 0.0


def _check_account(owner: str) -> None:
    """Raises InputError unless jobs can run as that user."""
    try:
        uid = pwd.getpwnam(owner).pw_uid
    except KeyError:
        raise InputError("owner", owner, "a user of this host: jobs run as their owners") from None
    if uid == 0:
        raise InputError("owner", owner, "a user other than root")


def _number(args: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(name, value, f"a whole number from {low} to {high}")
    return value


def _flag(args: Mapping[str, Any], name: str) -> bool:
    value = args.get(name, False)
    if not isinstance(value, bool):
        raise InputError(name, value, "true or false")
    return value


def _array(given: dict[str, Any]) -> int:
    """Takes the number of jobs out of the fields; 0: one that is of no array."""
    count = given.pop("array", 0)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_ARRAY:
        raise InputError("array", count, f"a whole number from 0 to {MAX_ARRAY}")
    return count
