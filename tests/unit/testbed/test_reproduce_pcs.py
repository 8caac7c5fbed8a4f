"""The chapter-3 report: every figure in its quick form, and its three files."""

import json

import pytest

from intentd.testbed import reproduce_pcs


def test_quick_report(tmp_path, monkeypatch):
    monkeypatch.setenv("INTENTD_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(reproduce_pcs, "WORKLOAD_3_LOAD", 1.2)
    out = tmp_path / "out"
    arguments = ["--quick", "--figures", "3.3,3.7,3.8,3.10", "--out", str(out)]
    assert reproduce_pcs.main(arguments) == 0
    sections = json.loads((out / "report.json").read_text())
    assert [section["figure"] for section in sections] == ["3.3", "3.7", "3.8", "3.10"]
    assert sections[0]["rows"] == []  # no traces
    assert len(sections[3]["rows"]) == 5
    assert "Figure 3.8" in (out / "report.md").read_text()
    assert "<table>" in (out / "report.html").read_text()


def test_wrong_arguments_are_refused(tmp_path):
    for arguments in (["--figures", "9.9"], ["--data", str(tmp_path)]):
        with pytest.raises(SystemExit):
            reproduce_pcs.main(arguments)
