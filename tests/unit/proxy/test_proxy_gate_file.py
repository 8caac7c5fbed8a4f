"""A gate trained on a desk's questions: from rows to a file, from the file to hits of a proxy."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.unit.core.prompts.test_cache_gate import desk, embed
from tests.unit.proxy.conftest import Site

from intentd.core.errors import ConfigError
from intentd.core.prompts.cache.gate import GateModel
from intentd.core.prompts.cache.rules import RuleGate
from intentd.core.prompts.modelfile import decode_model
from intentd.daemons.ctl import prompts_train

FITS = importlib.util.find_spec("lightgbm") is not None
ASKED = {
    "name": "asked",
    "stages": [
        {"cache": "semantic", "min_similarity": 0.3, "limit": 4}, {"context": "none"},
        {"model": "one", "models": "m"}, {"store": ["prompt"]},
    ],
}  # fmt: skip
STORED = "how do I open my account"
# the same question, and others that lie as near
OTHERS = (
    "can you open a account in paris?",
    "how do I open my account please",
    "I want to open the account in 2 steps",
    "how do I close my account",
    "how do I open my report",
    "how do I not open my account",
)


def cosine(first: str, second: str) -> float:
    vectors = embed([first, second])
    return float(vectors[0] @ vectors[1])


@pytest.fixture(scope="module")
def gate_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `intentctl prompts train cache` writes, with a small embedder in place of MiniLM."""
    base = tmp_path_factory.mktemp("gate")
    rows, out = base / "desk.jsonl", base / "gate.model"
    rows.write_text("".join(json.dumps({**row, "split": "train"}) + "\n" for row in desk(300, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_train, "embedder", lambda: embed)
        prompts_train.cache([rows], out, 0.02, 0, json=True)
    return out


@pytest.fixture
def embeds(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    def answer(body: dict[str, Any]) -> web.Response:
        texts: Sequence[str] = body["input"]
        data = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(embed(texts))]
        return web.json_response({"object": "list", "data": data, "usage": {"prompt_tokens": 3}})

    monkeypatch.setattr(site.provider, "_embeddings", answer)


async def results(site: Site, **cache: Any) -> tuple[Any, dict[str, tuple[str, str, Any]]]:
    """The cache's status; result, reason and a hit's score for each of OTHERS."""
    proxy = await site.start(
        models=[site.model("m"), site.model("e")],
        service_types=[ASKED],
        cache={"semantic": "on", "embedder_model": "e", **cache},
    )

    async def ask(prompt: str, **headers: str) -> dict[str, Any]:
        body = {"prompt": prompt, "service_type": "asked"}
        status, answer, _ = await site.post("/v1/request", body, headers=headers)
        assert status == 200, answer
        found: dict[str, Any] = answer["metadata"]["cache"]
        return found

    assert (await ask(STORED))["result"] == "miss"
    told = {}
    for other in OTHERS:
        cache_told = await ask(other, **{"Cache-Control": "no-store"})
        score = cache_told.get("gate_score")
        told[other] = (cache_told["result"], cache_told.get("reason", ""), score)
    return proxy.status()["cache"], told


@pytest.mark.skipif(not FITS, reason="lightgbm is not installed")
async def test_a_trained_gate_judges_the_proxys_hits(
    site: Site, embeds: None, gate_file: Path
) -> None:
    content = await asyncio.to_thread(gate_file.read_bytes)
    trained = decode_model(content, kind="cache")
    gate = trained.model
    assert isinstance(gate, GateModel)
    assert trained.made["files"][0]["file"] == "desk.jsonl"
    status, told = await results(site, gate_file=str(gate_file))
    assert (status["gate"], status["threshold"]) == ("GateModel", gate.threshold)
    words = {other: gate.judge(other, STORED, cosine(other, STORED)) for other in OTHERS}
    assert {result for result, _, _ in told.values()} == {"semantic", "miss"}
    for other, (result, reason, score) in told.items():
        assert (result == "semantic") == words[other].hit, other
        assert reason == words[other].reason
        if score is not None:
            assert score == pytest.approx(words[other].score, abs=1e-3)
            rules = RuleGate().judge(other, STORED, cosine(other, STORED))
            assert score != pytest.approx(rules.score, abs=1e-3)


@pytest.mark.parametrize("content", [None, b"PK nonsense"])
async def test_a_file_that_is_no_gate_is_refused(
    site: Site, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "gate.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        await results(site, gate_file=str(path))
    assert caught.value.field == "cache.gate_file"
