"""A slice of benchmarks.fuzz_proxy: hostile bodies at every door of a real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.fuzz_proxy import fuzz

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


@pytest.mark.parametrize("seed", [3])
async def test_every_body_gets_an_answer_or_a_named_refusal(tmp_path: Path, seed: int) -> None:
    found = await fuzz(1000, seed, tmp_path / "proxy")
    assert found["wrong"] == []
    assert found["secrets_or_traces_in_log"] == {}
    assert found["passed"]
