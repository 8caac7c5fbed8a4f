"""Failures of GPUs for simulated clusters: from a file, or drawn from a mean time between them."""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Sequence
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.sim.jobs import Failure

COLUMNS: Final = ("at_s", "gpus", "repair_s")
MAX_FAILURES: Final = 100_000


def read_failures(text: str, gpus: float) -> tuple[Failure, ...]:
    """CSV lines ``at_s,gpus,repair_s`` under that header. Raises InputError naming the line."""
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(name.strip() for name in rows[0]) != COLUMNS:
        raise InputError("failures", rows[0] if rows else "", f"the header {','.join(COLUMNS)}")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        where = f"failures: line {number}"
        try:
            at_s, lost, repair_s = (float(text) for text in row)
        except ValueError:
            raise InputError(where, ",".join(row)[:80], "three numbers") from None
        if not (lost == math.floor(lost) and 1 <= lost <= gpus):
            raise InputError(f"{where}: gpus", lost, f"1 to {gpus:g} GPUs")
        try:
            found.append(Failure(at_s, int(lost), repair_s))
        except InputError as error:
            raise InputError(f"{where}: {error.field}", error.value, error.expected) from None
    return _checked(sorted(found, key=lambda failure: failure.at_s), gpus)


def draw_failures(
    *, mtbf_s: float, repair_s: float, gpus: float, until_s: float, seed: int
) -> tuple[Failure, ...]:
    """One GPU at a time, each after exponential times of that mean while it is whole."""
    for name, value in (("mtbf", mtbf_s), ("repair", repair_s)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(name, value, "a time > 0")
    expected = until_s / (mtbf_s + repair_s) * gpus
    if expected > MAX_FAILURES / 2:
        raise InputError("mtbf", mtbf_s, f"a time that makes at most {MAX_FAILURES // 2} failures")
    found = []
    for gpu in range(int(gpus)):
        rng = random.Random(f"{seed} {gpu}")
        at_s = rng.expovariate(1 / mtbf_s)
        while at_s < until_s:
            found.append(Failure(at_s, 1, repair_s))
            at_s += repair_s + rng.expovariate(1 / mtbf_s)
    return tuple(sorted(found, key=lambda failure: failure.at_s))


def to_plain(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    return [{name: getattr(row, name) for name in COLUMNS} for row in failures]


def _checked(failures: list[Failure], gpus: float) -> tuple[Failure, ...]:
    """No more GPUs are away at once than there are."""
    if len(failures) > MAX_FAILURES:
        raise InputError("failures", len(failures), f"at most {MAX_FAILURES}")
    changes = [(failure.at_s, failure.gpus) for failure in failures]
    changes += [(failure.at_s + failure.repair_s, -failure.gpus) for failure in failures]
    away = 0
    for at_s, change in sorted(changes):
        away += change
        if away > gpus:
            raise InputError("failures", f"{away} GPUs away at {at_s:g} s", f"at most {gpus:g}")
    return tuple(failures)
