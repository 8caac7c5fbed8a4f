"""Models that litellm calls, answered by litellm's own mocks, in an environment of their own.

INTENTD_LITELLM_PYTHON names its interpreter; ``make test`` makes it of requirements-litellm.txt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

from intentd.core.errors import ConfigError
from intentd.daemons.kit.config import validate
from intentd.proxy.config import ProxyConfig
from intentd.proxy.daemon import load_litellm

PYTHON = os.environ.get("INTENTD_LITELLM_PYTHON", "")
SCRIPT = Path(__file__).parent / "sdk" / "litellm_proxy.py"
SOURCES = Path(__file__).parents[2] / "src"

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


@pytest.mark.skipif(not PYTHON, reason="INTENTD_LITELLM_PYTHON names no interpreter with litellm")
async def test_answers_errors_and_streams(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        PYTHON,
        str(SCRIPT),
        str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0
    assert json.loads(out.splitlines()[-1]) == {
        "text": "Hello there.",
        "cost": True,
        "limited": [429, "upstream_rate_limited"],
        "broken": [502, "upstream_status"],
        "full": [400, None],
        "slow": [504, "upstream_timeout"],
        "falls": "good",
        "mock_response": [400, "mock_response"],
        "vertex_credentials": [400, "vertex_credentials"],
        "fallbacks": [400, "fallbacks"],
        "stream": "Hello there.",
        "end": ["good", "[DONE]"],
        "message": "Hello there.",
        "response": 502,
    }


@pytest.mark.skipif("litellm" in sys.modules, reason="litellm is installed here")
async def test_it_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litellm", None)
    given = {"models": [{"name": "m", "provider": "litellm", "upstream_model": "anthropic/x"}]}
    with pytest.raises(ConfigError, match="proxy-litellm") as caught:
        await load_litellm(validate(ProxyConfig, given))
    assert caught.value.field == "models[0].provider"
