"""The allocator and its event loop in plain Python: slow, short, and what the kernel must equal.

It keeps no ordered queues and skips no passes; every decision starts from the list of active jobs
in arrival order. Same signature as the compiled ``run``.
"""

from __future__ import annotations

import bisect
import math
from functools import partial
from typing import Any

import numpy as np

NEAR = 1e-9
LEASE_GROWTH = 0.02  # of play-outs; as in kernel/kernel.h
FIFO, SRSF, THEMIS, AFS, MAXMIN, WFQ = range(6)
_MASK = 2**64 - 1


class Engine:
    """One run. Attributes named as in kernel/engine.h; jobs are indices in arrival order."""

    def __init__(self, numbers: Any, arrays: tuple[Any, ...]) -> None:
        (kind, integral, artifact, self.zeta, self.delta, self.lease_s, self.start_s,
         self.resize_s, self.preempt_s, self.min_runtime_s, self.checkpoint_s, self.capacity,
         self.now, seed, target, _, every, self.growth) = numbers.tolist()  # fmt: skip
        self.kind, self.integral, self.artifact = int(kind), bool(integral), bool(artifact)
        self.seed, self.target, self.every = int(seed), int(target), int(every)
        (self.submit, self.work, self.estimate, self.gmin, self.gmax, table, speeds, eff,
         thresholds, weights) = arrays[:10]  # fmt: skip
        self.table: list[int] = table.tolist()
        self.speeds: list[list[float]] = speeds.tolist()
        self.eff: list[list[float]] = eff.tolist()
        self.weights = weights.tolist() if self.kind == WFQ else [1.0]
        n = self.n = len(self.submit)
        self.klass = [0] * n
        if self.kind == WFQ:
            where = np.searchsorted(thresholds, self.work * self.estimate, side="left")
            self.klass = where.tolist()
        self.gangs = bool(np.any(self.gmin > 1))
        self.remaining, self.size = self.work.tolist(), self.work.tolist()
        self.grant, self.rate, self.stall = [0.0] * n, [0.0] * n, [0.0] * n
        self.since, self.saved, self.area0 = [0.0] * n, [0.0] * n, [0.0] * n
        self.seen0, self.events0 = [1.0] * n, [1.0] * n
        self.started, self.preempted = [False] * n, [False] * n
        self.active: list[int] = []
        self.run: list[int] = []
        self.next, self.area, self.seen, self.events = 0, 0.0, 0.0, 0.0
        self.begin = self.now
        self.lease_at, self.exact, self.decisions = self.now + self.lease_s, False, 0
        self.failures = arrays[18].reshape(-1, 2).tolist()
        self.predict, self.arrays = arrays[19], arrays
        self.owner: list[int] = arrays[29].tolist() or [-1] * n
        self.quota: list[float] = arrays[30].tolist()
        self.used = [0.0] * len(self.quota)
        self.held: list[int] = []
        self.most, self.gmax = self.gmax, self.gmax.copy()

    def load(self) -> None:
        active, left, grant, stall, since, seen, count, started = self.arrays[10:18]
        for j in range(self.n):
            if not active[j]:
                break
            self.next = j + 1
            self.remaining[j], self.stall[j] = float(left[j]), float(stall[j])
            self.since[j] = self.saved[j] = float(since[j])
            self.seen0[j], self.events0[j] = float(seen[j]), float(count[j])
            self.started[j] = self.preempted[j] = bool(started[j])
        for j in sorted(range(self.next), key=lambda j: grant[j] <= 0):
            self.admit(j)
        for j in range(self.next):
            if grant[j] > 0 and j not in self.held:
                self.grant[j], self.rate[j] = float(grant[j]), self.speed(j, float(grant[j]))
                self.started[j], self.preempted[j] = True, False
                self.run.append(j)

    # -- quotas of owners ----------------------------------------------------------------

    def admit(self, j: int) -> None:
        owner = self.owner[j]
        if owner >= 0:
            if self.used[owner] + self.least(j) > self.quota[owner] + NEAR:
                bisect.insort(self.held, j)
                return
            self.used[owner] += self.least(j)
        bisect.insort(self.active, j)

    def make_room(self, j: int) -> None:
        if self.owner[j] < 0:
            return
        self.used[self.owner[j]] -= self.least(j)
        waiting = [k for k in self.held if self.owner[k] == self.owner[j]]
        self.held = [k for k in self.held if self.owner[k] != self.owner[j]]
        for k in waiting:
            self.admit(k)

    def cap_owners(self) -> None:
        left = [quota - used for quota, used in zip(self.quota, self.used, strict=True)]
        for j in self.active:
            owner = self.owner[j]
            if owner >= 0:
                more = min(int(self.most[j]) - self.least(j), max(0, int(left[owner] + NEAR)))
                left[owner] -= more
                self.gmax[j] = self.least(j) + more

    # -- what a job is worth -------------------------------------------------------------

    def speed(self, j: int, gpus: float) -> float:
        row: list[float] = self.speeds[self.table[j]]
        top = int(self.gmax[j])
        if gpus >= top:
            return row[top]
        low = int(gpus)
        part = gpus - low
        return row[low] if part == 0 else row[low] + part * (row[low + 1] - row[low])

    def estimated(self, j: int) -> float:
        left: float = self.remaining[j]
        if self.exact or self.estimate[j] == 1:
            return left
        return float(max(self.remaining[j] * self.estimate[j], 1e-2))

    def least(self, j: int) -> int:
        return max(1, math.ceil(float(self.gmin[j]) - NEAR))

    def key(self, j: int) -> float:
        left, top = self.estimated(j), int(self.gmax[j])
        if self.kind == SRSF:
            return top * left / self.speed(j, top)
        return left / self.speed(j, self.least(j))

    def cap(self, j: int, zeta: float) -> int:
        row, cap = self.eff[self.table[j]], self.least(j)
        bar = zeta * row[cap]
        while cap < self.gmax[j] and row[cap + 1] >= bar:
            cap += 1
        return cap

    def finish_ratio(self, j: int, left: float) -> float:
        fair = self.capacity * (self.events0[j] + self.events) / (self.seen0[j] + self.seen)
        rate = min(fair, int(self.gmax[j])) / self.size[j]
        wait, work = (self.now - self.submit[j]) * rate, self.remaining[j] * rate
        return float(wait + work * (1 / min(left, int(self.gmax[j]))))

    # -- who gets what -------------------------------------------------------------------

    def allocate(self) -> dict[int, float]:
        if self.capacity <= NEAR or not self.active:
            return {}
        jobs = sorted(self.active, key=self.key) if self.kind in (SRSF, AFS) else self.active
        if self.kind in (FIFO, SRSF):
            grants = self.walk(jobs, self.capacity, {})[0]
        elif self.kind == THEMIS:
            grants = self.themis(jobs)
        elif self.kind == AFS:
            grants = self.afs(jobs)
        elif self.kind == MAXMIN:
            grants = self.maxmin(jobs)
        else:
            grants = self.wfq()
        return self.protect(grants) if self.min_runtime_s > 0 else grants

    def walk(
        self, jobs: list[int], left: float, grants: dict[int, float]
    ) -> tuple[dict[int, float], float]:
        for j in jobs:
            amount = min(left, float(self.gmax[j]))
            if left <= NEAR:
                break
            if amount >= self.gmin[j] - NEAR:
                grants[j] = amount
                left -= amount
        return grants, left

    def spill(self, jobs: list[int], left: float, grants: dict[int, float]) -> dict[int, float]:
        if not self.gangs or left <= NEAR:
            return grants
        for j in grants:
            more = min(left, self.gmax[j] - grants[j])
            if grants[j] > 0 and more > 0:
                grants[j] += more
                left -= more
        return self.walk([j for j in jobs if j not in grants], left, grants)[0]

    def themis(self, jobs: list[int]) -> dict[int, float]:
        grants: dict[int, float] = {}
        left, waiting = self.capacity, list(jobs)
        while left > NEAR and waiting:
            best = max(waiting, key=partial(self.finish_ratio, left=left))
            waiting.remove(best)
            amount = min(left, float(self.gmax[best]))
            if amount >= self.gmin[best] - NEAR:
                grants[best] = amount
                left -= amount
        return self.spill(jobs, left, grants)

    def afs(self, jobs: list[int]) -> dict[int, float]:
        left = self.capacity
        if sum(int(self.gmax[j]) for j in jobs) <= left:
            return self.walk(jobs, left, {})[0]
        first: dict[int, float] = {}
        for j in jobs:
            if left > NEAR and self.least(j) <= left + NEAR:
                first[j] = float(self.least(j))
                left -= first[j]
        if left <= NEAR:
            return first
        grants = dict(sorted(first.items()))
        while left > NEAR:
            best: tuple[int, float, float] | None = None
            for j, gpus in grants.items():
                if gpus >= self.gmax[j]:
                    continue
                work = self.estimated(j)
                at0 = 1 / (work / self.speed(j, gpus) + 1e-7)
                at1 = 1 / (work / self.speed(j, gpus + 1) + 1e-7)
                if best is None:
                    best = (j, at0, at1)
                    continue
                one, two = (at0, at1), best[1:]
                shorter = at0 > best[1]
                low, high = (one, two) if shorter else (two, one)
                if ((low[1] - low[0]) / low[0] > (high[1] - high[0]) / high[1]) == shorter:
                    best = (j, at0, at1)
            if best is None:
                break
            grants[best[0]] += min(left, 1.0)
            left -= 1.0
        return self.spill(jobs, max(left, 0.0), grants)

    def maxmin(self, jobs: list[int]) -> dict[int, float]:
        left = self.capacity
        by_service = self.integral or self.gangs
        if by_service:
            jobs = sorted(jobs, key=lambda j: self.size[j] - self.remaining[j])
        if sum(int(self.gmax[j]) for j in jobs) <= left:
            return self.walk(jobs, left, {})[0]
        if not by_service:
            shares = _water(left, [(float(self.gmax[j]), 1.0) for j in jobs])
            return dict(zip(jobs, shares, strict=True))
        grants: dict[int, float] = {}
        for j in jobs:
            if left > NEAR and self.least(j) <= left + NEAR:
                grants[j] = float(self.least(j))
                left -= grants[j]
        while left >= 1 - NEAR:
            open_ = [j for j in grants if grants[j] < self.gmax[j]]
            if not open_:
                break
            lowest = min(grants[j] for j in open_)
            for j in open_:
                if grants[j] == lowest and left >= 1 - NEAR:
                    grants[j] += 1
                    left -= 1
        return grants

    def wfq(self) -> dict[int, float]:
        members: dict[int, list[int]] = {}
        for j in self.active:
            members.setdefault(self.klass[j], []).append(j)
        busy = sorted(members)
        demands = [float(sum(int(self.gmax[j]) for j in members[k])) for k in busy]
        pairs = list(zip(demands, (self.weights[k] for k in busy), strict=True))
        shares = _water(self.capacity, pairs)
        if self.integral:
            shares = self.rounded(shares, demands, [members[k][0] for k in busy])
        grants: dict[int, float] = {}
        left = 0.0
        for klass, share, demand in zip(busy, shares, demands, strict=True):
            part, rest = self.fill(members[klass], share, demand)
            grants |= part
            left += rest
        idle = self.capacity - math.fsum(shares)
        if self.integral and idle > 0.5:
            left += idle
        ordered = [j for k in busy for j in members[k]]
        return self.spill(ordered, left, grants)

    def fill(self, jobs: list[int], share: float, demand: float) -> tuple[dict[int, float], float]:
        if share >= demand - NEAR or self.zeta <= 0:
            return self.walk(jobs, share, {})
        zeta, step = self.zeta, 0
        while True:
            grants: dict[int, float] = {}
            left, capped = share, False
            for j in jobs:
                if left <= NEAR:
                    break
                cap = self.cap(j, zeta)
                capped |= cap < self.gmax[j]
                amount = min(left, float(cap))
                if amount >= self.gmin[j] - NEAR:
                    grants[j] = amount
                    left -= amount
            if left <= NEAR or not capped:
                return grants, left
            step += 1
            zeta = self.zeta - step * self.delta

    def rounded(self, shares: list[float], demands: list[float], heads: list[int]) -> list[float]:
        needs = [self.least(j) for j in heads]
        if all(s == math.floor(s) and s >= n for s, n in zip(shares, needs, strict=True)):
            return shares
        left = min(self.capacity, sum(demands))
        given = [0.0] * len(shares)
        for b in sorted(range(len(shares)), key=lambda b: (self.submit[heads[b]], b)):
            if needs[b] <= left + NEAR:
                given[b] = float(needs[b])
                left -= needs[b]
        missing = [max(0.0, s - g) for s, g in zip(shares, given, strict=True)]
        total = sum(missing)
        parts = [m * (left / total) if total > 0 else 0.0 for m in missing]
        whole = [math.floor(p + NEAR) for p in parts]
        fraction = [p - w for p, w in zip(parts, whole, strict=True)]
        result = [g + w for g, w in zip(given, whole, strict=True)]
        for _ in range(math.floor(left - sum(whole) + 0.5)):
            best = 0
            for b in range(1, len(fraction)):
                if fraction[b] > fraction[best] + NEAR:
                    best = b
            if fraction[best] <= NEAR:
                break
            result[best] += 1
            fraction[best] = 0.0
        return result

    def protect(self, grants: dict[int, float]) -> dict[int, float]:
        floors = {
            j: min(self.grant[j], float(self.least(j)))
            for j in self.run
            if self.grant[j] > 0 and self.now < self.since[j] + self.min_runtime_s
        }
        if all(grants.get(j, 0.0) >= keep for j, keep in floors.items()):
            return grants
        idle = self.capacity - sum(grants.values())
        short = -idle
        for j, keep in floors.items():
            if grants.get(j, 0.0) < keep:
                short += keep - grants.get(j, 0.0)
                grants[j] = keep
        for turn in range(3):
            for j in sorted(grants, reverse=True):
                least = float(self.gmin[j])
                keep = floors.get(j, (least, 0.0)[min(turn, 1)]) if turn < 2 else 0.0
                if short <= NEAR or grants[j] <= keep + NEAR:
                    continue
                take = grants[j] - keep
                if take > short and not (turn and grants[j] - short < least):
                    take = short
                grants[j] -= take
                short -= take
        return {j: gpus for j, gpus in grants.items() if gpus > NEAR}

    # -- time ----------------------------------------------------------------------------

    def decide(self) -> None:
        self.decisions += 1
        if self.quota:
            self.cap_owners()
        grants = self.allocate()
        for j in self.run:
            if j not in grants:
                self.grant[j], self.preempted[j] = 0.0, True
                self.arrays[25][j] += 1
        for j, gpus in grants.items():
            if gpus == self.grant[j]:
                continue
            if self.grant[j] == 0:
                self.stall[j] = self.start_s + (self.preempt_s if self.preempted[j] else 0.0)
                self.since[j] = self.now
                if not self.started[j]:
                    self.arrays[21][j] = self.now
                self.started[j], self.preempted[j] = True, False
            else:
                self.stall[j] = max(self.stall[j], self.resize_s)
                self.arrays[24][j] += 1
            self.saved[j] = self.now
            self.grant[j], self.rate[j] = gpus, self.speed(j, gpus)
        self.run = list(grants)

    def advance(self, to: float) -> None:
        passed = to - self.now
        for j in self.run:
            wait = min(self.stall[j], passed)
            self.stall[j] -= wait
            self.remaining[j] -= self.rate[j] * (passed - wait)
        self.area += len(self.active) * passed
        self.seen += len(self.active)
        self.events += 1
        self.now = to

    def end(self, j: int) -> None:
        self.active.remove(j)
        self.run.remove(j)
        self.grant[j] = self.remaining[j] = 0.0
        self.arrays[20][j] = self.now
        lived = self.now - float(self.submit[j])
        if self.artifact:
            contention = (self.seen0[j] + self.seen) / (self.events0[j] + self.events)
            fair = self.size[j] / min(self.capacity / contention, int(self.gmax[j]))
        else:
            seen = (self.area - self.area0[j]) / lived if lived > 0 else len(self.active) + 1
            fair = self.size[j] / self.speed(j, self.capacity / max(1.0, seen))
        self.arrays[22][j] = fair
        self.make_room(j)

    def draw(self) -> float:
        self.seed = z = (self.seed + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return float((z ^ (z >> 31)) >> 11) * 2.0**-53

    def change_capacity(self, change: float) -> None:
        lost, before = -change, self.capacity
        self.capacity += change
        while lost > NEAR and before > NEAR:
            pick = self.draw() * before
            hit = None
            for j in self.run:
                pick -= self.grant[j]
                if pick < 0:
                    hit = j
                    break
            held = 1.0 if hit is None else self.grant[hit]
            lost, before = lost - held, before - held
            if hit is None:
                continue
            ran = self.now - self.saved[hit] - self.stall[hit]
            if self.checkpoint_s > 0 and ran > 0:
                ran = math.fmod(ran, self.checkpoint_s)
            back = self.remaining[hit] + self.rate[hit] * max(ran, 0.0)
            self.remaining[hit] = min(back, self.work[hit])
            self.grant[hit], self.preempted[hit] = 0.0, True
            self.run.remove(hit)
            self.arrays[25][hit] += 1

    def play(self) -> int:
        while self.active or self.next < self.n:
            when, kind, ending = math.inf, 0, -1
            for j in self.run:
                left = self.remaining[j] / self.rate[j] if self.remaining[j] > 0 else 0.0
                if self.now + self.stall[j] + left < when:
                    when, kind, ending = self.now + self.stall[j] + left, 1, j
            if self.lease_s > 0 and self.active and self.lease_at < when:
                when, kind = self.lease_at, 2
            if self.min_runtime_s > 0 and len(self.active) > len(self.run):
                for j in self.run:
                    if self.now < self.since[j] + self.min_runtime_s < when:
                        when, kind = self.since[j] + self.min_runtime_s, 2
            if self.failures and self.failures[0][0] < when:
                when, kind = self.failures[0][0], 3
            if self.next < self.n and self.submit[self.next] < when:
                when, kind = float(self.submit[self.next]), 4
            stuck = kind == 2 and not self.run and self.next == self.n and not self.failures
            if kind == 0 or stuck:
                return -1
            self.advance(max(when, self.now))
            if kind == 1:
                self.end(ending)
                if ending == self.target:
                    return 0
            elif kind == 3:
                self.change_capacity(self.failures.pop(0)[1])
            elif kind == 4:
                self.arrive()
            self.lease_at = self.now + max(self.lease_s, self.growth * (self.now - self.begin))
            self.decide()
            if kind == 4 and self.predict[self.next - 1]:
                self.arrays[23][self.next - 1] = self.play_out(self.next - 1)[0]
            if kind == 4 and self.every > 0 and self.next % self.every == 0:
                row = (self.next // self.every - 1) * self.n
                self.arrays[28][row : row + self.n] = self.play_out(-1)[1]
        return -1 if self.held else 0

    def arrive(self) -> None:
        j = self.next
        self.next += 1
        self.seen0[j] = len(self.active) + 1 - self.seen
        self.events0[j], self.area0[j] = 1 - self.events, self.area
        self.admit(j)

    def play_out(self, target: int) -> tuple[float, Any]:
        """When the target ends if nothing else arrives, and when each job does."""
        copy = object.__new__(Engine)
        copy.__dict__.update(self.__dict__)
        for name, value in self.__dict__.items():
            if isinstance(value, list):
                setattr(copy, name, value.copy())
        for j in copy.active:
            copy.remaining[j] = self.estimated(j)
            if self.artifact:
                copy.size[j] = copy.remaining[j]
        copy.exact, copy.target, copy.next, copy.failures = True, target, self.n, []
        copy.begin, copy.growth = self.now, 0.0 if self.artifact else LEASE_GROWTH
        if self.artifact:
            copy.lease_at = math.inf
        copy.arrays = self.arrays[:20] + tuple(np.full(self.n, np.nan) for _ in range(7))
        done = copy.play() == 0
        return (copy.now if done else math.inf), copy.arrays[20]


def _water(capacity: float, pairs: list[tuple[float, float]]) -> list[float]:
    """Weighted max-min shares of (demand, weight) pairs."""
    shares = [-1.0] * len(pairs)
    left = capacity
    while True:
        open_ = [b for b, share in enumerate(shares) if share < 0]
        total = sum(pairs[b][1] for b in open_)
        level = left / total if total > 0 else 0.0
        full = [b for b in open_ if pairs[b][0] <= level * pairs[b][1]]
        for b in full or open_:
            shares[b] = pairs[b][0] if full else level * pairs[b][1]
        left -= sum(pairs[b][0] for b in full)
        if not full:
            return shares


def run(mode: int, numbers: Any, arrays: tuple[Any, ...]) -> int:
    """As the compiled run: mode 0 decides once, 1 plays on; answers go into the arrays."""
    engine = Engine(numbers, arrays)
    if engine.quota and (engine.every or engine.predict.any()):
        raise ValueError("quotas and predictions inside a run do not go together")
    engine.load()
    if mode == 0 or engine.active:
        engine.decide()
    code = engine.play() if mode == 1 else 0
    arrays[26][:] = engine.grant
    arrays[27][:] = (engine.now, engine.decisions, engine.area, len(engine.active))
    return code
