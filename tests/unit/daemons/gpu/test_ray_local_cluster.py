"""Which node of a local Ray cluster is started when; Ray itself is played."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from intentd.daemons.gpu.ray_cluster import LocalCluster

# Nodes that start while there is no head wait for it for ever. Where told to, the first node that
# starts takes the head along.
RAY = """
import os, pathlib, signal, subprocess, sys, time
here = pathlib.Path(os.environ["PLAYED"])
if "--head" in sys.argv:
    (here / "head").write_text(str(os.getpid()))
    gcs = subprocess.Popen([here / "gcs_server", "600"])
    (here / "gcs").write_text(str(gcs.pid))
elif (here / "take").exists():
    (here / "take").unlink()
    os.kill(int((here / "head").read_text()), signal.SIGKILL)
    time.sleep(600)
print("Ray runtime started", flush=True)
time.sleep(600)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    played = tmp_path / "played" / "ray" / "scripts"
    played.mkdir(parents=True)
    for package in (played, played.parent):
        (package / "__init__.py").touch()
    (played / "scripts.py").write_text(RAY)
    sleep = shutil.which("sleep")
    assert sleep is not None
    (tmp_path / "gcs_server").symlink_to(sleep)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "played"))
    monkeypatch.setenv("PLAYED", str(tmp_path))
    (tmp_path / "ray").mkdir()
    settings = {"nodes": {"a": 1, "b": 1}, "temp_dir": tmp_path / "t", "object_store_bytes": 1}
    made = LocalCluster(tmp_path / "ray", settings)
    try:
        yield made
    finally:
        made._end_all()


def whole_again(cluster: LocalCluster) -> dict[str, int]:
    while any(process.poll() is not None for process in cluster._running.values()):
        cluster._restart()
        time.sleep(0.01)
    return {name: process.pid for name, process in cluster._running.items()}


def test_a_head_that_dies_while_a_node_starts_does_not_wait_for_that_node(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    (tmp_path / "take").touch()
    cluster._start("", None)
    first = cluster._running[""].pid
    for name in ("a", "b"):
        cluster._start(name, 1)
        assert cluster._running[name].poll() is not None
    now = whole_again(cluster)
    assert now[""] != first
    assert list(now) == ["", "a", "b"]


def test_a_head_without_its_core_is_started_again_with_all_its_nodes(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    cluster._start("", None)
    for name in ("a", "b"):
        cluster._start(name, 1)
    before = whole_again(cluster)
    cluster._restart()
    assert whole_again(cluster) == before
    os.kill(int((tmp_path / "gcs").read_text()), signal.SIGKILL)
    while cluster._running[""].poll() is None:
        cluster._restart()
        time.sleep(0.01)
    assert all(process.poll() is not None for process in cluster._running.values())
    after = whole_again(cluster)
    assert not set(before.values()) & set(after.values())
