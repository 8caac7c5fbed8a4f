"""The learner, the gate and a link together: classes follow the workload, no flow is lost."""

from __future__ import annotations

import numpy as np

from intentd.core.flows.assemble import DomainSettings
from intentd.core.flows.learning import Learner
from intentd.core.flows.sampling import FlowTrace, poisson_trace
from intentd.core.flows.workloads import workload
from intentd.core.sim.adaptive import simulate_adaptive
from intentd.core.sim.flows import NO_MAX_WAIT_S


def test_classes_follow_the_workload_and_every_flow_ends() -> None:
    parts = [
        poisson_trace(workload(name).cdf, load=0.7, rate_bps=10e9, flows=4000, seed=seed)
        for seed, name in enumerate(("web-search", "cache"))
    ]
    trace = FlowTrace(
        np.concatenate([parts[0].arrivals_s, parts[0].arrivals_s[-1] + parts[1].arrivals_s]),
        np.concatenate([part.sizes_bytes for part in parts]),
    )
    settings = DomainSettings("link", 10e9, max_wait_s=NO_MAX_WAIT_S)
    run = simulate_adaptive(trace, settings, Learner(), interval_s=1.0)
    assert (run.result.fct_s > 0).all()
    assert run.result.degraded == {}
    assert next(classes for _, classes in run.classes if classes > 1) == 3
    assert run.classes[-1][1] == 2
    assert len(run.changes) == 1
    assert 4000 < run.changes[0] <= 5200
    least = trace.sizes_bytes * 8 / 10e9
    assert (run.result.fct_s >= least * (1 - 1e-9)).all()
