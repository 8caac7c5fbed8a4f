"""Mutated configurations under load: a small slice of ``benchmarks.reload_mutations``."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.reload_mutations import campaign

pytestmark = pytest.mark.real


async def test_reloads_neither_break_nor_lie(tmp_path: Path) -> None:
    found = await campaign(100, 20_000, tmp_path)
    assert found["ok"], found
    assert found["crashes"] == found["dropped"] == found["lies"] == 0
    assert found["taken"] + found["refused"] == sum(found["outcomes"].values()) == 100
    assert found["unmutated"] == {"taken": 5}
    assert found["taken"] > 10
    assert found["refused"] > 10
    assert found["handled_errors"] == {}
