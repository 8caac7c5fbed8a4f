"""Which node of a local Ray cluster is started when; Ray itself is played."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from intentd.daemons.gpu.ray_cluster import LocalCluster

# A node finds no head if there is none any more, and waits for it for ever; the first node that
# starts takes the head along.
RAY = """
import os, pathlib, signal, sys, time
here = pathlib.Path(os.environ["PLAYED"])
if "--head" in sys.argv:
    (here / "head").write_text(str(os.getpid()))
elif not (here / "taken").exists():
    (here / "taken").touch()
    os.kill(int((here / "head").read_text()), signal.SIGKILL)
    time.sleep(600)
print("Ray runtime started", flush=True)
time.sleep(600)
"""


def test_a_head_that_dies_while_a_node_starts_does_not_wait_for_that_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = tmp_path / "played" / "ray" / "scripts"
    played.mkdir(parents=True)
    for package in (played, played.parent):
        (package / "__init__.py").touch()
    (played / "scripts.py").write_text(RAY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "played"))
    monkeypatch.setenv("PLAYED", str(tmp_path))
    directory = tmp_path / "ray"
    directory.mkdir()
    settings = {"nodes": {"a": 1, "b": 1}, "temp_dir": tmp_path / "t", "object_store_bytes": 1}
    cluster = LocalCluster(directory, settings)
    try:
        cluster._start("", None)
        first = cluster._running[""].pid
        cluster._start("a", 1)
        assert cluster._running["a"].poll() is not None
        cluster._start("b", 1)
        assert cluster._running["b"].poll() is not None
        while any(process.poll() is not None for process in cluster._running.values()):
            cluster._restart()
            time.sleep(0.01)
        assert cluster._running[""].pid != first
        assert list(cluster._running) == ["", "a", "b"]
    finally:
        cluster._end_all()
