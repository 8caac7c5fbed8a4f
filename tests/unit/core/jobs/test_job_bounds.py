"""Sizes, tables and names of a job from outside: bounded, each with one error; old books load."""

from __future__ import annotations

from typing import Any

import pytest

from intentd.core.errors import InputError
from intentd.core.jobs.job import Job, job_from_plain, job_to_plain
from intentd.core.jobs.spec import MAX_SIZE_GPU_S, spec_from_plain


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"profile": ["x"]}, "profile"),
        ({"profile": 3}, "profile"),
        ({"profile": "p", "speeds": 5}, "speeds"),
        ({"profile": "p", "speeds": {"1": 2}}, "speeds"),
        ({"profile": "p", "speeds": ["fast", 1]}, "speeds[0]"),
        ({"speeds": [0, 1, 1.5]}, "speeds"),
        ({"size_gpu_s": 10**400}, "size_gpu_s"),
        ({"size_gpu_s": 1.1e12}, "size_gpu_s"),
        ({"size_gpu_s": 1e308}, "size_gpu_s"),
        ({"time_limit_s": 10**400}, "time_limit_s"),
        ({"grace_s": -(10**400)}, "grace_s"),
        ({"demand": {"9" * 5000: 1}}, "demand"),
        ({"demand": {10**5000: 1}}, "demand"),
        ({"demand": {"1": 10**400}}, "demand[1]"),
        ({"demand": {"1": 1e13}}, "demand[1]"),
        ({"demand": {"v100": {"9" * 5000: 1}}}, "demand.v100"),
        ({"max_gpus": 10**5000}, "max_gpus"),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, dict) else next(iter(value)),
)
def test_one_error_names_the_field(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        spec_from_plain({"command": ["x"], **wrong}, {"p": (0.0, 1.0, 1.8)})
    assert caught.value.field == field
    assert len(str(caught.value)) < 1000


def test_books_of_a_version_without_bounds_load() -> None:
    spec = spec_from_plain({"command": ["x"], "size_gpu_s": 5, "max_gpus": 2})
    plain = job_to_plain(Job(1, spec, 0.0, 5.0))
    plain["size_gpu_s"] = plain["spec"]["size_gpu_s"] = plain["spec"]["time_limit_s"] = 1e300
    job = job_from_plain(plain)
    assert job.size_gpu_s == job.spec.size_gpu_s == MAX_SIZE_GPU_S
    table = spec_from_plain({"command": ["x"], "demand": {"v100": {"1": 9.0, "2": 6.0}}})
    plain = job_to_plain(Job(2, table, 0.0, 9.0))
    plain["spec"]["demand"]["v100"]["2"] = 1e300
    assert job_from_plain(plain).spec.demand_by["v100"] == {1: 9.0, 2: 5e11}
