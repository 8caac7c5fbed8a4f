"""intentctl jobs, against a daemon that says what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.ctl import main as tool
from intentd.daemons.ctl.output import ExitCode

Out = Callable[[], tuple[str, str]]


def piece(text: str, at: int, state: str = "running", **more: Any) -> dict[str, Any]:
    end = at + len(text)
    return {
        "text": text,
        "offset": at,
        "next": end,
        "dropped": 0,
        "end": end,
        "state": state,
    } | more


@pytest.fixture
def gpu(said: Any) -> Any:
    said.serve("gpu")
    return said


def test_logs_that_are_followed_come_piece_by_piece(
    gpu: Any, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intentd.daemons.ctl.jobs.FOLLOW_S", 0.0)
    pieces = [piece("one ", 0), piece("", 4), piece("two", 10, dropped=6), piece("", 13, "failed")]
    gpu.answers["jobs.logs"] = list(pieces)
    assert tool.main(["jobs", "logs", "7", "--follow", "--json"]) == ExitCode.OK
    documents = [json.loads(line) for line in out()[0].splitlines()]
    assert [row["text"] for row in documents] == ["one ", "two", ""]
    assert (documents[1]["dropped"], documents[-1]["state"]) == (6, "failed")
    assert [args["offset"] for _, _, args in gpu.asked] == [0, 4, 4, 13]
    gpu.answers["jobs.logs"] = list(pieces)
    assert tool.main(["jobs", "logs", "7", "--follow"]) == ExitCode.OK
    shown, told = out()
    assert shown == "one two"
    assert "6 bytes" in told


def test_logs_of_a_job_that_never_stops_printing_end(gpu: Any, out: Out) -> None:
    gpu.answers["jobs.logs"] = [piece("ab", 3, end=7, dropped=3), piece("cdef", 5, end=99)]
    assert tool.main(["jobs", "logs", "7", "--json"]) == ExitCode.OK
    document = json.loads(out()[0])
    assert document == {"job": 7, "text": "abcdef", "dropped": 3, "state": "running"}


def asked(gpu: Any, *words: str) -> dict[str, Any]:
    """What the daemon was asked by a command."""
    gpu.asked.clear()
    tool.main(["jobs", *words])
    assert len(gpu.asked) == 1, gpu.asked
    args: dict[str, Any] = gpu.asked[0][2]
    return args


def test_zeros_are_said_and_win_over_the_file(gpu: Any, tmp_path: Path) -> None:
    zeros = ["--grace", "0s", "--trials", "0", "--time-limit", "0s", "--array", "0", "--size", "0"]
    said = {"grace_s": 0, "trials": 0, "time_limit_s": 0, "array": 0, "size_gpu_s": 0, "retries": 0}
    assert asked(gpu, "submit", *zeros, "--retries", "0") == said
    job = tmp_path / "job.json"
    job.write_text(json.dumps(dict.fromkeys(said, 7) | {"name": "kept"}))
    given = asked(gpu, "submit", "-f", str(job), *zeros, "--retries", "0")
    assert given == said | {"name": "kept"}
    assert asked(gpu, "submit", "-f", str(job)) == dict.fromkeys(said, 7) | {"name": "kept"}


def test_predict_and_what_if_take_what_submit_takes(gpu: Any) -> None:
    words = ["--env", "A=b", "--label", "x=y", "--workdir", "/tmp", "--trials", "3", "--array", "4",
             "--checkpoint-signal", "SIGUSR1", "--retries", "1", "--gpus", "1-4"]  # fmt: skip
    first = asked(gpu, "submit", *words, "--", "train", "--fast")
    assert first["command"] == ["train", "--fast"]
    assert asked(gpu, "predict", *words, "--", "train", "--fast") == first
    assert asked(gpu, "what-if", *words, "--", "train", "--fast") == first


def test_demand_by_type_and_spread(gpu: Any, out: Out) -> None:
    given = asked(gpu, "submit", "--demand", "v100:1=2h,2=1h", "--demand", "v100/2:2=70min")
    assert given["demand"] == {"v100": {"1": 7200, "2": 3600}, "v100/2": {"2": 4200}}
    assert asked(gpu, "submit", "--demand", "1=9,2=5")["demand"] == {"1": 9, "2": 5}
    for wrong in (["1=9", "v100:1=9"], [":1=9"], ["1=9", "1=8"]):
        options = [word for value in wrong for word in ("--demand", value)]
        assert tool.main(["jobs", "submit", *options]) == ExitCode.USAGE
    assert "9" * 50 not in out()[1]


def test_gpus_beyond_all_numbers_are_one_error(gpu: Any, out: Out) -> None:
    for wrong in ("9" * 5000, "1-" + "9" * 5000, "-", "1-", "-4"):
        assert tool.main(["jobs", "submit", f"--gpus={wrong}"]) == ExitCode.USAGE
        told = out()[1]
        assert told.startswith("intentctl: --gpus: got ")
        assert len(told) < 600
    assert gpu.asked == []


def test_a_refusal_names_the_option_that_was_typed(gpu: Any, out: Out) -> None:
    gpu.answers["jobs.submit"] = "size_gpu_s: got 2e+12, expected a number from 0 to 1e+12"
    assert tool.main(["jobs", "submit", "--size", "2e12", "x"]) == ExitCode.USAGE
    assert out()[1].startswith("intentctl: --size: size_gpu_s: got 2e+12")
    assert tool.main(["jobs", "submit", "--", "x"]) == ExitCode.USAGE
    assert out()[1].startswith("intentctl: size_gpu_s: got 2e+12")


def row(job: int, **more: Any) -> dict[str, Any]:
    known = {"job": job, "name": "n", "owner": "o", "state": "pending", "gpus": 0, "min_gpus": 1,
             "max_gpus": 1, "done_percent": 0.0, "array_index": -1, "predicted": None}  # fmt: skip
    return known | more


def test_lists_go_on_and_say_when_they_are_cut(gpu: Any, out: Out) -> None:
    gpu.answers["jobs.list"] = {"jobs": [row(9), row(8, array_index=3)], "next": 8}
    assert asked(gpu, "list", "--before", "12", "--limit", "2")["before"] == 12
    shown, told = out()
    assert "n[3]" in shown
    assert "--before 8" in told
    pages = [{"jobs": [row(9)], "next": 9}, {"jobs": [row(4)], "next": 0}]
    gpu.answers["jobs.list"] = pages
    assert tool.main(["jobs", "list", "--all", "--json"]) == ExitCode.OK
    document = json.loads(out()[0])
    assert [item["job"] for item in document["jobs"]] == [9, 4]
    assert document["next"] == 0


def test_many_jobs_are_cancelled_by_what_they_are(gpu: Any, out: Out) -> None:
    gpu.answers["jobs.list"] = {"jobs": [row(5), row(4)], "next": 0}
    gpu.answers["jobs.cancel"] = [{"job": 5}, "job 4: belongs to bob"]
    words = ["jobs", "cancel", "--label", "team=a", "--array", "4", "--json"]
    assert tool.main(words) == ExitCode.FAILED
    document = json.loads(out()[0])
    assert document == {"jobs": [5], "refused": {"4": "job 4: belongs to bob"}}
    listed = gpu.asked[0][2]
    assert (listed["label"], listed["array"], listed["state"]) == ("team=a", 4, ["unfinished"])
    for wrong in ([], ["7", "--label", "a=b"]):
        assert tool.main(["jobs", "cancel", *wrong]) == ExitCode.USAGE


def test_times_beyond_all_dates_are_shown(gpu: Any, out: Out) -> None:
    late = {"p50_s": 1e12, "p90_s": 1e300, "in_p50_s": 1e12, "in_p90_s": None, "made_s": 0.0,
            "size_class": 0, "coverage_percent": None, "cause": "x"}  # fmt: skip
    gpu.answers["jobs.list"] = {"jobs": [row(1, predicted=late), row(2)], "next": 0}
    assert tool.main(["jobs", "list"]) == ExitCode.OK
    assert "beyond any date" in out()[0]
    gpu.answers["jobs.predict"] = {"predicted": late, "delayed_jobs": 0, "delays_s": {}}
    assert tool.main(["jobs", "predict", "--size", "1"]) == ExitCode.OK
    assert "years" in out()[0]
