"""Ray Tune inside of a job that is a set of trials: as many at a time as the job has GPUs.

    from intentd.daemons.gpu.client.tune import run
    results = run(trainable, {"lr": tune.loguniform(1e-4, 1e-1)}, trials=20)

Submit it with ``--trials 20 --gpus 1-20 --checkpoint-signal SIGUSR1``. The trials run in a Ray of
the job's own, on the GPUs it was given, one GPU each. Finished trials, and those that run by their
share of ``iterations``, are reported as progress, so that the end is predicted. Asked to end
(SIGUSR1, Tune's own signal for it) Tune saves its state; the next run, with however many GPUs, goes
on from there: finished trials stay finished, others continue from the checkpoint they last gave
to ``tune.report``. A job of several nodes is refused: its Ray is one host's.

Needs ``ray[tune]``; imports nothing before it is called.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from intentd.daemons.gpu.client.progress import gpus, report


def run(
    trainable: Any,
    param_space: dict[str, Any],
    *,
    trials: int = 0,
    iterations: int = 1,
    directory: str | Path = "tune",
    name: str = "experiment",
    tune_config: dict[str, Any] | None = None,
) -> Any:
    """Tune's ResultGrid; of an interrupted run what there is so far.

    trials: samples of param_space; 0: what the job was submitted with. iterations: reports of one
    trial. directory: where the experiment is kept, one that the job sees wherever it runs.
    tune_config: more fields of ``tune.TuneConfig``. Raises ValueError for a job of several nodes.
    """
    if int(os.environ.get("INTENTD_NODES", "1")) > 1:
        raise ValueError(
            "trials: got GPUs of several nodes, expected one: bound max_gpus by a node"
        )
    import ray
    from ray import tune

    count = trials or int(os.environ.get("INTENTD_TRIALS", "1"))
    own = len(gpus())
    with tempfile.TemporaryDirectory(prefix="tn-", dir="/tmp") as temporary:
        ray.init(
            address="local",
            num_cpus=max(own, 1),
            num_gpus=own,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80_000_000,
            _temp_dir=temporary,
        )
        try:
            where = Path(directory).absolute()
            resources = {"cpu": 1, "gpu": 1} if own else {"cpu": 1}
            placed = tune.with_resources(trainable, resources)
            if tune.Tuner.can_restore(str(where / name)):
                tuner = tune.Tuner.restore(
                    str(where / name), placed, resume_unfinished=True, param_space=param_space
                )
            else:
                tuner = tune.Tuner(
                    placed,
                    param_space=param_space,
                    tune_config=tune.TuneConfig(num_samples=count, **(tune_config or {})),
                    run_config=tune.RunConfig(
                        name=name,
                        storage_path=str(where),
                        verbose=0,
                        callbacks=[_reporter(count, iterations)],
                    ),
                )
            results = tuner.fit()
            ended = sum(1 for result in results if result.metrics and result.metrics.get("done"))
            report(min(ended, count), count)
            return results
        finally:
            ray.shutdown()


def _reporter(count: int, iterations: int) -> Any:
    """Tells the scheduler how many trials are done, those that run in part."""
    from ray import tune

    class Reporter(tune.Callback):  # type: ignore[misc]  # ray is half typed
        def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
            done = 0.0
            for trial in trials:
                steps = (trial.last_result or {}).get("training_iteration", 0)
                # a trial that ended counts whole, however few reports it made
                done += 1.0 if trial.is_finished() else min(0.99, steps / max(iterations, 1))
            report(min(done, count), count)

    return Reporter()
