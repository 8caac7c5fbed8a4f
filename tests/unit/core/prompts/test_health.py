"""Cooldown, probes and the budget of retries."""

from __future__ import annotations

from intentd.core.prompts.health import HealthState, ModelHealth, RetryBudget


def test_opens_after_failures_in_a_row() -> None:
    health = ModelHealth(failures=3, cooldown_s=5.0)
    assert [health.failed(1.0, "x") for _ in range(2)] == [False, False]
    health.succeeded()
    assert [health.failed(1.0, "x") for _ in range(3)] == [False, False, True]
    assert not health.admit(5.9)
    assert health.wait_s(5.0) == 1.0
    assert health.admit(6.0)
    assert health.state is HealthState.HALF_OPEN


def test_one_probe_at_a_time_and_longer_pauses() -> None:
    health = ModelHealth(failures=1, cooldown_s=5.0)
    health.failed(0.0, "x")
    assert health.admit(5.0)
    assert not health.admit(5.1)
    assert health.failed(5.2, "x")
    assert health.wait_s(5.2) == 10.0
    assert health.admit(15.2)
    health.succeeded()
    assert health.state is HealthState.CLOSED
    health.failed(20.0, "x")
    assert health.wait_s(20.0) == 5.0


def test_a_probe_that_never_ends_is_forgotten() -> None:
    health = ModelHealth(failures=1, cooldown_s=5.0)
    health.failed(0.0, "x")
    assert health.admit(5.0)
    assert not health.admit(9.9)
    assert health.admit(10.0)


def test_retry_after_prevails() -> None:
    health = ModelHealth(failures=5, cooldown_s=5.0)
    assert health.failed(0.0, "rate_limited", 30.0)
    assert health.wait_s(0.0) == 30.0
    health.failed(1.0, "rate_limited", 60.0)  # one that was under way
    assert health.wait_s(1.0) == 60.0


def test_retries_are_a_share_of_requests() -> None:
    budget = RetryBudget(share=0.25, burst=2.0)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.request()
    assert [budget.take() for _ in range(2)] == [True, False]
    assert not RetryBudget(share=0.0).take()


def test_a_rate_limit_lasts_as_long_as_the_provider_says() -> None:
    health = ModelHealth(failures=2, cooldown_s=5.0)
    for start in (0.0, 1.0, 2.0, 3.0):
        assert health.admit(start)
        assert health.failed(start, "rate_limited", 1.0)
        assert (health.wait_s(start), health.reason) == (1.0, "rate_limited")
    assert health.admit(4.0)
    assert health.admit(4.0), "nobody has to prove that it works"
    assert health.state is HealthState.CLOSED
    health.failed(5.0, "rate_limited", 1e9)
    assert health.wait_s(5.0) == 3600.0
