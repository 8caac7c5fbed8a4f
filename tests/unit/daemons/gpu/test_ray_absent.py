"""A cluster, or the package, that is not there: said in one line, nothing started."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from intentd.core.errors import ConfigError
from intentd.core.jobs.job import Job, Start
from intentd.core.jobs.spec import spec_from_plain
from intentd.daemons.gpu.ray_executor import UNSENT_S, RayExecutor, RaySettings
from intentd.daemons.kit.clock import ManualClock


class Sink:
    """What the scheduler would hear."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def lost(self, job: int, epoch: int, why: str, *, began: bool) -> None:
        self.told.append((job, epoch, why, began))

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"unexpected: {name}")


def executor(base: Path, sink: Sink, clock: ManualClock) -> RayExecutor:
    settings = RaySettings(
        address="127.0.0.1:1",
        namespace="intentd",
        local={},
        directory=base / "ray",
        temp_dir=str(base / "temp"),
        work_dir=base / "work",
        object_store_bytes=1,
        heartbeat_s=1.0,
        lease_s=10.0,
        lost_after_s=15.0,
    )
    return RayExecutor(base / "jobs", sink, clock, settings, 1 << 20, [])


def test_without_the_package_it_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"jobs\.executor.*ray.*intentd\[gpu-ray\]"):
        executor(tmp_path, Sink(), ManualClock())
    assert list(tmp_path.iterdir()) == []


def test_without_a_cluster_a_start_is_given_back_with_the_reason(tmp_path: Path) -> None:
    sink, clock = Sink(), ManualClock()
    it = executor(tmp_path, sink, clock)
    it._hear({"kind": "refused", "why": "no cluster at 127.0.0.1:1"})
    assert it.unready() == ["ray: no cluster at 127.0.0.1:1"]
    job = Job(1, spec_from_plain({"command": ["true"]}), 0.0, 5.0)
    it.start(Start(1, 1, {"a": (0,)}), job)
    it.poll()
    assert sink.told == []
    clock.advance(UNSENT_S + 1)
    it.poll()
    assert sink.told == [(1, 1, "no Ray cluster: no cluster at 127.0.0.1:1", False)]
