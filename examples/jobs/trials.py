"""A job that is a set of trials, under Ray Tune: learning rates of a small network.

    intentctl jobs submit --gpus 1-4 --size 20m --trials 12 --checkpoint-signal SIGUSR1 \\
        --grace 30s --workdir /shared/search1 -- python examples/jobs/trials.py

As many trials run at a time as the job has GPUs; when the scheduler gives it more or fewer it
saves, starts again and goes on. Needs ``pip install 'ray[tune]'``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray import tune

from intentd.daemons.gpu.client.tune import run

STEPS = 10


def trial(config: dict[str, Any]) -> None:
    """Gradient descent on a bowl; saves at every report."""
    x, first = 1.0, 0
    kept = tune.get_checkpoint()
    if kept is not None:
        with kept.as_directory() as directory:
            text = (Path(directory) / "state").read_text(encoding="ascii").split()
            x, first = float(text[0]), int(text[1])
    for step in range(first, STEPS):
        time.sleep(config["pace_s"])
        x -= config["rate"] * 2 * x
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "state").write_text(f"{x} {step + 1}", encoding="ascii")
            saved = tune.Checkpoint.from_directory(directory)
            tune.report({"loss": x * x if math.isfinite(x) else 1e9}, checkpoint=saved)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=0, help="0: as many as the job was given")
    parser.add_argument("--pace-s", type=float, default=0.5)
    arguments = parser.parse_args()
    space = {"rate": tune.loguniform(1e-3, 1.0), "pace_s": arguments.pace_s}
    results = run(trial, space, trials=arguments.trials, iterations=STEPS)
    done = [result for result in results if result.metrics and "loss" in result.metrics]
    if done:
        best = min(done, key=lambda result: result.metrics["loss"])
        print(f"{len(done)} trials, best rate {best.config['rate']:.4g}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
