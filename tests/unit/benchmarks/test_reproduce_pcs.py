"""The chapter-3 report: every figure in its quick form, and its three files."""

import json

import pytest
from benchmarks import reproduce_pcs


def test_quick_report(tmp_path, monkeypatch):
    monkeypatch.setenv("INTENTD_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(reproduce_pcs, "WORKLOAD_3_LOAD", 1.2)
    out = tmp_path / "out"
    spread = {"avg": 1.0, "p50": 1.0, "p90": 2.0, "p99": 3.0, "max": 4.0}
    measured = {"jct_s": spread, "pred_err_percent": spread, "unfairness_percent": spread}
    testbed = {
        "policies": {"pcs-jct": measured | {"published": "within 20 %"}},
        "pooled": {
            "jobs": 50,
            "finish_error_percent": spread,
            "decision_to_effect_p50_ms": 8.0,
        },
    }
    (tmp_path / "testbed.json").write_text(json.dumps(testbed))
    arguments = ["--quick", "--figures", "3.3,3.4-3.6,3.7,3.8,3.10", "--out", str(out)]
    arguments += ["--testbed", str(tmp_path / "testbed.json")]
    assert reproduce_pcs.main(arguments) == 0
    sections = json.loads((out / "report.json").read_text())
    assert [section["figure"] for section in sections] == ["3.3", "3.4-3.6", "3.7", "3.8", "3.10"]
    assert sections[0]["rows"] == []  # no traces
    assert len(sections[4]["rows"]) == 4
    assert sections[1]["rows"][0][:3] == ["pcs-jct", 1.0, 2.0]
    assert "Figure 3.8" in (out / "report.md").read_text()
    assert "<table>" in (out / "report.html").read_text()


def test_wrong_arguments_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")
    for arguments in (
        ["--figures", "9.9"],
        ["--data", str(tmp_path)],
        ["--testbed", str(wrong)],
        ["--testbed", str(tmp_path / "absent.json")],
    ):
        with pytest.raises(SystemExit):
            reproduce_pcs.main(arguments)
