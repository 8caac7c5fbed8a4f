"""Bad input to intentctl: exit 2, one line naming the option, the value and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from intentd.daemons.ctl import main as tool
from intentd.daemons.ctl.output import ExitCode
from intentd.testbed import netns

WORKLOADS = "one of data-mining, web-search, cache, hadoop, uniform, uniform-chapter"
POLICIES = "2d, 2d-boost, htb, ps, fifo, np-sjf, baraat, aalo, pias, lps"
DURATION = "a number >= 0 or text such as '250ms'"
SIM = "sim flows --workload cache --flows 300 --policies fifo"


@pytest.fixture(autouse=True)
def _private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on standard error, without the program's name."""
    assert tool.main(words.split()) == ExitCode.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("intentctl: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("flows classes", "--workload, --cdf: got 'neither', expected exactly one of them"),
        (
            "flows classes --workload cache --samples 0",
            "--samples: got '0', expected greater than or equal to 1",
        ),
        (
            "flows classes --workload cache --seed -1",
            "--seed: got '-1', expected greater than or equal to 0",
        ),
        (
            "flows classes --workload cache --samples x",
            "--samples: got 'x', expected a valid integer, unable to parse string as an integer",
        ),
        ("sim flows --flows 10", "--workload, --cdf: got 'neither', expected exactly one of them"),
        ("sim flows --workload cache --cdf x",
         "--workload, --cdf: got 'both', expected exactly one of them"),
        ("sim flows --workload vl2", f"--workload: got 'vl2', expected {WORKLOADS}"),
        (f"{SIM} --load nan", "--load: got nan, expected a share of the link in (0, 1.5)"),
        (f"{SIM} --load 0", "--load: got 0.0, expected a share of the link in (0, 1.5)"),
        (f"{SIM} --flows 0", "--flows: got 0, expected 1 to 50000000"),
        (f"{SIM} --flows -1", "--flows: got -1, expected 1 to 50000000"),
        (f"{SIM} --policies 2d,magic",
         f"--policies: got 'magic', expected some of {POLICIES}, srpt"),
        (f"{SIM} --policies ,", f"--policies: got ',', expected some of {POLICIES}, srpt"),
        (f"{SIM} --rate fast",
         "--rate: got 'fast', expected a number >= 0 or text such as '1Gbit'"),
        (f"{SIM} --weights equal", "--weights: got 'equal', expected job-shares or virtual-ps"),
        (f"{SIM} --thresholds mine",
         "--thresholds: got 'mine', expected algorithm1 or published"),
        ("sim faults --seeds 5", "--seeds: got '5', expected A:B with 0 <= A < B"),
        ("sim faults --seeds 5:1", "--seeds: got '5:1', expected A:B with 0 <= A < B"),
        ("sim faults --seeds 0:1 --loss 1.5", "--loss: got 1.5, expected a share in 0 to 0.9"),
        ("sim faults --seeds 5:5", "--seeds: got '5:5', expected A:B with 0 <= A < B"),
        ("sim faults --seeds x", "--seeds: got 'x', expected A:B with 0 <= A < B"),
        ("sim faults --seeds 0:10000001",
         "--seeds: got '0:10000001', expected at most 10000000 seeds"),
        ("sim jobs --workload workload-1 --scaling x.csv",
         "--scaling: got 'x.csv', expected nothing beside --workload"),
        ("sim jobs --trace x.csv --jobs 5", "--jobs: got '5', expected nothing beside --trace"),
        ("sim jobs --trace x.csv --load .5", "--load: got '0.5', expected nothing beside --trace"),
        ("pareto search --trace x.csv --load .5",
         "--load: got '0.5', expected nothing beside --trace"),
        ("pareto search --workload workload-1 --first 5",
         "--first: got '5', expected nothing beside --workload"),
        ("sim faults --jobs -1", "--jobs: got -1, expected 0 or a number of processes"),
        ("testbed run overall --workload vl2", f"--workload: got 'vl2', expected {WORKLOADS}"),
        ("testbed run overall --load 2", "--load: got 2.0, expected a share of the link in (0, 1)"),
        ("testbed run overall --duration -1", f"--duration: got '-1', expected {DURATION}"),
        ("testbed run overall --policies x", f"--policies: got 'x', expected one of {POLICIES}"),
        ("testbed run overall --loopback --policies 2d,x",
         f"--policies: got 'x', expected one of {POLICIES}"),
        ("testbed run all --workload cache,vl2", f"--workload: got 'vl2', expected {WORKLOADS}"),
        ("testbed run cluster_reuse --policies 2d",
         "--policies: got '2d', expected nothing: not taken by cluster_reuse"),
        ("testbed run downlink --policies 2d,ps",
         "--policies: got '2d,ps', expected nothing: not taken by downlink"),
        ("testbed run faults --policies 2d",
         "--policies: got '2d', expected nothing: not taken by faults"),
        ("testbed run global_order --policies 2d",
         "--policies: got '2d', expected nothing: not taken by global_order"),
        ("testbed run overall --load .5,.8",
         "--load: got '0.5,0.8', expected one of them for overall"),
        ("testbed run downlink --workload cache,uniform",
         "--workload: got 'cache,uniform', expected 1 of them for downlink"),
        ("testbed run mixed --workload cache",
         "--workload: got 'cache', expected 2 or more of them for mixed"),
        ("testbed run faults --seeds 3",
         "--seeds: got 3, expected nothing: not taken by faults (--first-seed is)"),
        ("testbed run overall --rounds 3",
         "--rounds: got 3, expected nothing: not taken by overall"),
        ("testbed run mixed --early-fin 1KB",
         "--early-fin: got 1000, expected nothing: not taken by mixed"),
        ("testbed run global_order --gate local",
         "--gate: got 'local', expected agent: global_order needs the daemons"),
        ("testbed run faults --loopback",
         "namespaces: got 'the loopback', expected root: faults needs network namespaces"),
        (
            "testbed run nope",
            "experiment: got 'nope', expected all or one of "
            "overall, cluster_reuse, mixed, load, global_order, downlink, faults",
        ),
        ("policy rollback 0", "number: got '0', expected greater than or equal to 1"),
        ("up --port-base 70000", "--port-base: got '70000', expected less than or equal to 65000"),
        ("check-config cook", "role: got 'cook', expected one of "
         "controller, sequencer, agent, gpu, proxy"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words.startswith("testbed") and netns.unavailable():
        words = f"{words} --loopback" if "--loopback" not in words else words
    assert refused(words, capsys) == says
    assert not list(Path.cwd().iterdir())  # nothing was started, no directory made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got 'no points', expected lines of size_bytes,cdf"),
        ("size,share\n1,1\n", "line 1: got 'size,share', expected numbers, or the header"),
        ("1,0\n2,.5\n", "line 2: cdf: got 0.5, expected 1 (a CDF ends at 1)"),
        ("1,0\n2,.9\n3,.8\n4,1\n", "line 3: cdf: got 0.8, expected at least the point before"),
        ("3,0\n2,1\n", "line 2: size_bytes: got 2.0, expected at least the point before (3)"),
        ("1,0\n2,1.5\n", "line 2: cdf: got 1.5, expected a share in 0 to 1"),
        ("nan,0\n2,1\n", "line 1: size_bytes: got nan, expected a number of bytes from 0 to 1e+18"),
        ("-5,0\n2,1\n", "line 1: size_bytes: got -5.0, expected a number of bytes from 0 to 1e+18"),
        ("1,0,7\n2,1\n", "line 1: got '1,0,7', expected two columns, size_bytes,cdf"),
    ],
)
def test_a_cdf_that_cannot_be(text: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.csv").write_text(text)
    for command in ("flows classes", "sim flows"):
        assert refused(f"{command} --cdf bad.csv", capsys).startswith(f"bad.csv: {says}")


def test_files_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    expects = "expected a readable text file"
    assert refused("flows classes --cdf no.csv", capsys).startswith(
        f"--cdf: got 'no.csv', {expects}"
    )
    Path("bytes.csv").write_bytes(b"\xff\xfe\x00")
    assert refused("flows classes --cdf bytes.csv", capsys).startswith(
        f"--cdf: got 'bytes.csv', {expects}"
    )
    assert refused("testbed run overall --workload bytes.csv --loopback", capsys).startswith(
        f"--workload: got 'bytes.csv', {expects}"
    )
    Path("deep.json").write_text("[" * 100_000)
    assert refused("pareto show deep.json", capsys) == (
        "file: got 'deep.json', expected a JSON document that is not nested so deeply"
    )
    assert refused("sim jobs --workload workload-1 --config deep.json", capsys).startswith(
        "--config: got 'deep.json', expected a JSON document that"
    )
    Path("front.json").write_text('{"front": [{"config": {"name": "fifo"}, "train": {"a": "x"}}]}')
    assert refused("pareto show front.json", capsys) == (
        "front[0].train.a: got 'x', expected a number"
    )
    Path("mine.csv").write_text("1,0\n2,1\n")
    assert refused("flows classes --cdf mine.csv --thresholds published", capsys) == (
        "--thresholds: got 'published', expected algorithm1 (a file has no published table)"
    )
    assert refused("testbed report nowhere", capsys).startswith(
        "directory: got 'nowhere', expected results of an experiment"
    )
    assert refused("keys show nowhere", capsys) == (
        "nowhere: got 'No such file or directory', expected a readable key file"
    )
    assert refused("check-config agent no.toml", capsys) == (
        "no.toml: file: got 'No such file or directory', expected a readable file"
    )


def test_status_of_nothing_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["status", "--json", "--run-dir", str(tmp_path)]) == ExitCode.UNREACHABLE
    shown = capsys.readouterr()
    assert shown.err == f"intentctl: no daemon answers in {tmp_path}\n"
    assert shown.out.startswith("{")
