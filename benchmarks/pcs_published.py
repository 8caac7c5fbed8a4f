"""What chapter 3 of the dissertation and its artifact publish, and where the traces are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from intentd.core.errors import InputError
from intentd.core.jobs import traces
from intentd.core.jobs.allocator import JobTable

GPUS: Final = 64
TRACES: Final = {"0e4a51": 1, "b436b2": 2, "6c71a0": 4, "2869ce": 5}  # the chapter's trace numbers
AFS_JCT_S: Final = {"0e4a51": 237_150, "2869ce": 60_967, "6c71a0": 101_500, "b436b2": 210_250}
# average JCT over AFS, average and p99 prediction error in percent (artifact data of figure 3.7)
POLICIES: Final[dict[str, dict[str, tuple[float, float, float]]]] = {
    "0e4a51": {"afs": (1, 25.6, 240), "srsf": (1.064, 26.6, 314), "fifo": (9.301, 0, 0)},
    "b436b2": {"afs": (1, 83.8, 771), "srsf": (1.316, 86.6, 792), "fifo": (59.98, 0, 0)},
    "6c71a0": {"afs": (1, 17.0, 194), "srsf": (1.073, 18.4, 216), "fifo": (31.52, 0, 0)},
    "2869ce": {"afs": (1, 9.03, 113.6), "srsf": (1.428, 11.17, 241.1), "fifo": (4.857, 0, 0)},
}
POINTS: Final[dict[str, tuple[tuple[float, float, float], ...]]] = {
    "0e4a51": ((1.57, 5.6, 116), (2.61, 0.80, 7.2)),
    "b436b2": ((2.25, 1.27, 26),),
    "6c71a0": ((1.47, 4.9, 92),),
}


def directory(given: Path | None = None) -> Path | None:
    """Where the traces are: given, $INTENTD_DATA or ../shared/data; None if nowhere."""
    base = given or Path(os.environ.get("INTENTD_DATA", "../shared/data"))
    for path in (base, base / "pcs"):
        if (path / "scaling.csv").exists():
            return path
    if given is not None:
        raise InputError("--data", str(given), "a directory with scaling.csv and the traces")
    return None


def load(name: str, data: Path, first: int | None = None) -> JobTable:
    """One trace, or its first jobs."""
    scaling = traces.read_scaling((data / "scaling.csv").read_text(encoding="utf-8"))
    text = (data / f"trace_{name}.csv").read_text(encoding="utf-8")
    return traces.read_csv(text, scaling, first)
