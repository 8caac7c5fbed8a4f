"""Workloads at their scale, policies for them, and the simulator on a recorded trace."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest

from intentd.core.errors import InputError
from intentd.core.flows.policies import POLICIES
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.testbed.experiments.cluster_reuse import sequence
from intentd.testbed.experiments.downlink import WEIGHTS, class_shares, contention
from intentd.testbed.experiments.global_order import ordered_globally
from intentd.testbed.experiments.mixed import mixture
from intentd.testbed.experiments.options import EXPERIMENTS, Options
from intentd.testbed.policies import policy_for, sample, scaled_workload
from intentd.testbed.replay import replay
from intentd.testbed.runner import names
from intentd.testbed.shaping import priorities, quantum_bytes
from intentd.testbed.toml import to_toml
from intentd.testbed.traffic.records import FlowRecord
from intentd.testbed.traffic.trace import TraceFlow, offered_load


@pytest.mark.parametrize("name", ["data-mining", "web-search", "cache", "uniform"])
def test_scaled_workloads_give_a_hundred_flows_a_second(name: str) -> None:
    source = scaled_workload(name)
    per_s = 0.8 * 1e9 * 1448 / 1514 / 8 / source.scaled_mean_bytes
    assert 3000 / 35 <= per_s <= 150


def test_cdf_files_are_workloads_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("size_bytes,cdf\n1000,0\n3000,1\n")
    source = scaled_workload(str(path), scale=2.0)
    assert (source.name, source.scaled_mean_bytes) == ("mine", 4000.0)
    assert scaled_workload(str(path)).scaled_mean_bytes == pytest.approx(1e6)
    with pytest.raises(InputError, match="workload"):
        scaled_workload(str(tmp_path / "absent.csv"))
    with pytest.raises(InputError, match="workload"):
        scaled_workload("no such")
    with pytest.raises(InputError, match="scale"):
        scaled_workload("cache", scale=-1.0)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_made(name: str) -> None:
    policy = policy_for(name, [scaled_workload("web-search")], domain="d", rate_bps=1e9, load=0.8)
    assert policy.name == name
    assert math.fsum(cls.weight for cls in policy.classes) == pytest.approx(1.0)


def test_pias_thresholds_are_scaled_with_the_workload() -> None:
    source = scaled_workload("web-search")
    policy = policy_for("pias", [source], domain="d", rate_bps=1e9, load=0.8)
    assert policy.classes[0].threshold_bytes == pytest.approx(909 * 1460 * 0.5)
    with pytest.raises(InputError, match="srpt"):
        policy_for("srpt", [source], domain="d", rate_bps=1e9, load=0.8)


def test_a_mixture_has_equal_bytes_of_each() -> None:
    sources = [scaled_workload("uniform"), scaled_workload("uniform-chapter", scale=0.001)]
    sizes = sample(sources, count=20_000)
    small = sum(size for size in sizes if size < 400_000)
    assert small / sum(sizes) == pytest.approx(0.5, abs=0.08)
    trace = mixture(sources, load=0.6, rate_bps=1e9, duration_s=20, seed=1)
    assert offered_load(trace, 1e9) == pytest.approx(0.6, rel=0.1)


def test_a_sequence_changes_the_workload_in_equal_parts() -> None:
    sources = [scaled_workload("uniform"), scaled_workload("uniform", scale=0.01)]
    trace = sequence(sources, load=0.5, rate_bps=1e9, duration_s=10, seed=1)
    assert min(flow.size_bytes for flow in trace if flow.arrival_s < 5) >= 500_000
    assert max(flow.size_bytes for flow in trace if flow.arrival_s > 5) <= 150_000


def test_replay_gives_each_server_its_own_link() -> None:
    policy = DomainPolicy("d", 1e9, (ClassPolicy(math.inf, 1.0),))
    flows = [TraceFlow(0.0, 1000, 0, 0), TraceFlow(0.0, 1000, 0, 1), TraceFlow(0.0, 1000, 0, 0)]
    assert replay(flows, policy, 8e3, servers=2) == [1.0, 1.0, 2.0]
    assert replay(flows[:1], policy, 8e3) == [1.0]


def test_global_order_leaves_flows_under_one_bdp_alone() -> None:
    policy = ordered_globally(DomainPolicy("d", 1e9, (ClassPolicy(math.inf, 1.0),)))
    assert policy.local_below_bytes == 25_000
    assert [cls.sequencing for cls in policy.classes] == ["global"]


def test_class_shares_count_only_the_time_both_were_busy() -> None:
    records = [
        FlowRecord(0, 0, 0, 700, 0, 0.0, 0.0, 0.0, 0.0, 1.0),
        FlowRecord(1, 0, 1, 600, 1, 0.0, 0.0, 0.0, 0.0, 2.0),
    ]
    assert class_shares(records) == [pytest.approx(0.7), pytest.approx(0.3)]
    flows = contention(1.0, 1e9)
    by_server = [sum(f.size_bytes for f in flows if f.server == s) for s in (0, 1)]
    assert all(total >= 1e9 / 8 * weight for total, weight in zip(by_server, WEIGHTS, strict=True))


def test_marks_and_quanta_of_the_testbeds_own_htb() -> None:
    policy = DomainPolicy("d", 1e9, (ClassPolicy(10, 0.6), ClassPolicy(math.inf, 0.4)))
    assert priorities(policy) == [0x1000A, 0x1000B]
    assert quantum_bytes(0.4, 0.4) == 100_000
    assert quantum_bytes(0.6, 0.4) == 150_000
    assert quantum_bytes(0.99, 0.0001) == 4_000_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"gate": "none"},
        {"duration_s": -1.0},
        {"rate_bps": 1.0},
        {"loads": (1.5,)},
        {"seeds": -1},
        {"early_fin_bytes": -1},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Options(**wrong)  # type: ignore[arg-type]


def test_experiment_names() -> None:
    assert names("all") == list(EXPERIMENTS)
    assert names("cluster-reuse") == ["cluster_reuse"]
    with pytest.raises(InputError, match="one of"):
        names("nothing")
    assert list(Options(seeds=2, first_seed=5).seed_range(9)) == [5, 6]
    assert list(Options().seed_range(3)) == [1, 2, 3]


def test_toml_is_what_tomllib_reads() -> None:
    table = {
        "name": 'a "quoted" name',
        "path": Path("/tmp/x"),
        "number": 5,
        "rate": 1e9,
        "limit": math.inf,
        "on": True,
        "table": {"a b": [1, 2], "inner": {"x": "y"}},
        "rows": [{"name": "one"}, {"name": "two"}],
    }
    expected = table | {"path": "/tmp/x"}
    assert tomllib.loads(to_toml(table)) == expected
    with pytest.raises(TypeError):
        to_toml({"nothing": None})
