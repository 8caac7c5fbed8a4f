import math
import subprocess
import sys

import pytest

from intentd.core.errors import InputError
from intentd.core.flows.policies import (
    POLICIES,
    SizeSample,
    lps_level,
    make_domain_policy,
)
from intentd.core.flows.policy import DomainPolicy, domain_from_plain, domain_to_plain
from intentd.core.flows.workloads import WORKLOADS

CACHE = WORKLOADS["cache"]
MINING = WORKLOADS["data-mining"]


def make(name: str, **more: object) -> DomainPolicy:
    settings: dict[str, object] = {
        "domain": "eth0",
        "rate_bps": 1e9,
        "sizes": CACHE.cdf,
        "load": 0.8,
        "thresholds_bytes": CACHE.published_thresholds_bytes,
    }
    return make_domain_policy(name, **{**settings, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_valid_named_and_survives_the_wire(name: str) -> None:
    policy = make(name)
    assert policy.name == name
    assert domain_from_plain(domain_to_plain(policy)) == policy
    marks = [cls.dscp for cls in policy.classes]
    assert len(set(marks)) == len(marks)


def test_2d_is_fifo_classes_with_job_shares() -> None:
    policy = make("2d", sizes=MINING.cdf, thresholds_bytes=MINING.published_thresholds_bytes)
    weights = [cls.weight for cls in policy.classes]
    assert weights == pytest.approx([0.704, 0.098, 0.101, 0.048, 0.030, 0.019], abs=1e-3)
    assert {(cls.mpl, cls.order) for cls in policy.classes} == {(1, "fifo")}


def test_boost_and_htb_share_the_classes_of_2d() -> None:
    limits = [(cls.threshold_bytes, cls.weight) for cls in make("2d").classes]
    for name in ("2d-boost", "htb"):
        assert [(c.threshold_bytes, c.weight) for c in make(name).classes] == limits
    assert all(cls.mpl == 0 for cls in make("htb").classes)
    assert all(cls.order == "boost" for cls in make("2d-boost").classes)


def test_class_without_a_gamma_stays_fifo() -> None:
    policy = make("2d-boost", gammas_per_s=[None, 3.0])
    assert [cls.order for cls in policy.classes] == ["fifo", "boost"]


def test_one_class_policies() -> None:
    assert [c.mpl for c in make("ps").classes] == [0]
    assert [(c.mpl, c.order) for c in make("fifo").classes] == [(1, "fifo")]
    assert [(c.mpl, c.order) for c in make("np-sjf").classes] == [(1, "sjf")]
    assert [c.mpl for c in make("lps").classes] == [10]


def test_lps_level_follows_the_load() -> None:
    assert [lps_level(load) for load in (0.01, 0.5, 0.8, 0.9)] == [3, 4, 10, 20]
    assert lps_level(1.7) == lps_level(0.95)


def test_baraat_cuts_at_p90_and_multiplexes_the_rest() -> None:
    policy = make("baraat")
    assert policy.dispatch == "empty_class"
    assert policy.classes[0].threshold_bytes == CACHE.cdf.quantile(0.9)
    assert len(policy.classes) == 15
    assert policy.classes[0].weight == pytest.approx(9 * policy.classes[1].weight)


def test_aalo_limits_are_decades_and_weights_fall_linearly() -> None:
    policy = make("aalo", sizes=MINING.cdf)
    limits = [cls.threshold_bytes for cls in policy.classes]
    assert limits == [1e3, 1e4, 1e5, 1e6, 1e7, 1e8, math.inf]
    first = policy.classes[0].weight
    assert [10 * cls.weight / first for cls in policy.classes] == pytest.approx(range(10, 3, -1))


def test_pias_uses_the_authors_thresholds_where_they_exist() -> None:
    policy = make("pias", workload="web-search")
    assert policy.classes[0].threshold_bytes == 909 * 1460
    assert [cls.priority for cls in policy.classes] == list(range(8))
    assert all(cls.mpl == 0 for cls in policy.classes)
    split = make("pias")
    assert split.classes[3].threshold_bytes == CACHE.cdf.quantile(0.5)
    atom = make("pias", sizes=[5.0] * 90 + [9.0] * 10)
    assert [cls.threshold_bytes for cls in atom.classes] == [5.0, math.inf]


def test_sample_stands_for_a_cdf() -> None:
    sizes = [CACHE.cdf.quantile((i + 0.5) / 5000) for i in range(5000)]
    for name in POLICIES:
        from_cdf, from_sample = make(name), make(name, sizes=sizes)
        assert [c.weight for c in from_sample.classes] == pytest.approx(
            [c.weight for c in from_cdf.classes], abs=1e-3
        )
        assert [c.boost_gamma_per_s for c in from_sample.classes] == pytest.approx(
            [c.boost_gamma_per_s for c in from_cdf.classes], rel=0.01
        )


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("srpt", {}, "policy: got 'srpt'.*simulation only"),
        ("2e", {}, "policy: got '2e'"),
        ("2d", {"thresholds_bytes": None}, "thresholds_bytes: got None"),
        ("2d", {"sizes": None}, "sizes: got None"),
        ("2d", {"weights": [1.0]}, "weights: got 1, expected one for each of 2"),
        ("2d", {"weights": [0.7, 0.7]}, "weights that sum to 1"),
        ("2d", {"thresholds_bytes": [9.0, 5.0, math.inf]}, "thresholds_bytes"),
        ("2d", {"thresholds_bytes": [1e6]}, "infinity"),
        ("2d", {"thresholds_bytes": [10.0, math.inf]}, "a class that some flows fall into"),
        ("2d-boost", {"load": None}, "load: got None"),
        ("2d-boost", {"gammas_per_s": [1.0]}, "gammas_per_s"),
        ("lps", {"load": None}, "load: got None"),
        ("lps", {"load": 0.0}, "load: got 0.0"),
        ("baraat", {"load": math.nan}, "load: got nan"),
        ("aalo", {"sizes": None}, "sizes: got None"),
        ("aalo", {"sizes": []}, "at least one flow size"),
        ("pias", {"sizes": [-1.0]}, "finite sizes >= 0"),
        ("fifo", {"rate_bps": 0}, "rate_bps"),
        ("fifo", {"sequencing": "worldwide"}, "sequencing"),
    ],
)
def test_what_is_missing_or_wrong_is_named(name: str, change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(name, **change)


def test_overload_has_a_policy_too() -> None:
    for name in POLICIES:
        make(name, load=3.0)


def test_size_sample_is_a_distribution() -> None:
    sample = SizeSample.of([4.0, 1.0, 1.0, 2.0])
    assert sample.mean_bytes == 2.0
    assert [sample.share(s) for s in (0.5, 1.0, 3.0, 9.0)] == [0.0, 0.5, 0.75, 1.0]
    assert sample.quantile(1.0) == 4.0


def test_agents_do_not_import_numpy_with_the_gate() -> None:
    code = (
        "import sys; import intentd.core.flows.gate, intentd.core.flows.policies, "
        "intentd.core.flows.workloads, intentd.core.flows.virtual_ps, intentd.core.stats; "
        "sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
