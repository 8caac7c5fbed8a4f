"""Jobs, policies, choices from outside: whatever a field holds, it is taken or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from intentd.core.errors import InputError
from intentd.core.jobs.choice import Choice, choice_from_plain
from intentd.core.jobs.policy import JobsPolicy, from_plain, make, to_plain, wfq
from intentd.core.jobs.spec import JobSpec, spec_from_plain, spec_to_plain
from intentd.core.units import is_finite

HUGE = 10**400  # an int in JSON that no float holds
DIGITS = "9" * 5000  # more than int() reads
ODD = [
    HUGE, -HUGE, math.nan, math.inf, -1, 0, 1.5, True, None, "x", "\ud800", DIGITS,
    [], [[]], [HUGE], ["\ud800"], {}, {"a": 1}, {"1": HUGE}, {DIGITS: 1}, {"\ud800": "\ud800"},
    {"a": "\ud800"}, {"a": {"1": HUGE}}, {"a/1": {DIGITS: 1}},
]  # fmt: skip

READERS: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, Any], list[str]]] = {
    "job": (
        lambda given: spec_to_plain(spec_from_plain(given, {"p": (0.0, 1.0, 1.9)})),
        {"command": ["true"]},
        [item.name for item in fields(JobSpec)],
    ),
    "job of a profile": (
        lambda given: spec_from_plain(given, {"p": (0.0, 1.0, 1.9)}),
        {"command": ["true"], "profile": "p"},
        [item.name for item in fields(JobSpec)],
    ),
    "policy": (
        lambda given: to_plain(from_plain(given)),
        to_plain(make("wfq")),
        [item.name for item in fields(JobsPolicy)],
    ),
    "wfq": (
        lambda given: wfq([1.0, 2.0, 50.0, 900.0], **given),
        {"T": 1.0, "W": 0.0, "zeta": 0.0, "delta": 0.1},
        ["T", "W", "zeta", "delta"],
    ),
    "choice": (choice_from_plain, {}, [item.name for item in fields(Choice)]),
}


@pytest.mark.parametrize("name", READERS)
def test_an_odd_value_is_taken_or_refused(name: str) -> None:
    read, base, names = READERS[name]
    refused = 0
    for field in names:
        for odd in ODD:
            try:
                read({**base, field: odd})
            except InputError as error:
                refused += 1
                str(error).encode()  # can be said
    assert refused > len(ODD)


def test_no_program_is_given_what_it_cannot_be_given() -> None:
    for field, value in (
        ("command", ["a", "\ud800"]),
        ("env", {"A": "\udcff"}),
        ("workdir", "/\0"),
    ):
        with pytest.raises(InputError, match=field):
            spec_from_plain({"command": ["true"], field: value})


def test_finite_numbers() -> None:
    assert all(is_finite(value) for value in (0, -1, 1.5, 10**300))
    assert not any(is_finite(value) for value in (HUGE, math.inf, math.nan, True, "1", None))
