"""The service type `router`: a trained file loaded, used, reloaded, explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.core.prompts.test_modelfile import router_model

from intentd.core.errors import ConfigError
from intentd.core.prompts.modelfile import encode_model
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.proxy import minilm, routing


class Embedder:
    """One direction a text, of the dimensions the router was made for."""

    def __init__(self, _path: Path | None) -> None:
        pass

    def embed(self, texts: Sequence[str]) -> Any:
        return np.eye(6, dtype=np.float32)[: len(texts)]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A router that foretells a gain of .1 for every prompt."""
    monkeypatch.setattr(minilm, "MiniLM", Embedder)
    monkeypatch.setattr(routing, "missing_parts", lambda _file: [])
    model = router_model()
    model = replace(model, stack=np.zeros_like(model.stack), mean_gain=0.1)
    path = tmp_path / "router.model"
    path.write_bytes(encode_model(model, {"files": ["rows"]}))
    return path


def break_file(path: Path) -> None:
    path.write_bytes(b"PK nonsense")


def pool(site: Any) -> list[dict[str, Any]]:
    return [site.model("m"), site.model("big", price_in="9")]


NAMES = {"small": "m", "large": "big"}


async def test_prompts_go_where_the_gain_says(site: Any, trained: Path) -> None:
    proxy = await site.start(models=pool(site), router={"files": [str(trained)], "names": NAMES})
    for threshold, model in ((0.05, "big"), (0.2, "m")):
        options = {"intentd": {"options": {"threshold": threshold}}}
        _, answer, headers = await site.chat(model="router", **options)
        assert answer["intentd"]["model"] == model
        assert answer["intentd"]["selection"] == {
            "threshold": threshold, "predicted_gain": 0.1, "router_known": True,
            "escalated": model == "big",
        }  # fmt: skip
        assert headers["X-Intentd-Escalated"] == str(model == "big").lower()
    told = await proxy.admin("route", {"prompt": "a poem"})
    assert (told["model"], told["predicted_gain"], told["known"]) == ("big", 0.1, True)
    assert told["trained"][0]["made"] == {"files": ["rows"]}
    assert "foretold" in told["why"]


async def test_a_pair_nobody_learned_is_neutral(site: Any, trained: Path) -> None:
    proxy = await site.start(models=pool(site), router={"files": [str(trained)]})
    assert (await site.chat(model="router"))[1]["intentd"]["model"] == "m"
    told = await proxy.admin("route", {"prompt": "a poem"})
    assert (told["model"], told["known"], told["trained"]) == ("m", False, [])
    with pytest.raises(AdminRefusedError, match="psychic"):
        await proxy.admin("route", {"prompt": "x", "service_type": "psychic"})


async def test_calls_of_other_types_are_explained_by_their_pipeline(site: Any) -> None:
    models = [site.model(name, price_in=price) for name, price in zip("abc", "123", strict=True)]
    proxy = await site.start(models=models)
    told = await proxy.admin("route", {"prompt": "x", "service_type": "cost"})
    assert (told["model"], told["calls"]) == ("a", [{"model": "a", "purpose": "answer"}])
    told = await proxy.admin("route", {"prompt": "x", "service_type": "model_selector"})
    assert told["calls"] == [
        {"model": "b", "purpose": "answer"},
        {"model": "a", "purpose": "verify"},
        {"model": "c", "purpose": "answer"},
    ]
    assert "below 8" in told["why"]
    assert site.provider.requests == []  # nobody was asked
    with pytest.raises(AdminRefusedError, match=r"router\.files"):
        await proxy.admin("route", {"prompt": "x"})


async def test_routers_come_and_go_by_reload(site: Any, trained: Path) -> None:
    proxy = await site.start(models=pool(site))
    assert (await site.chat(model="router"))[0] == 404
    router = {"files": [str(trained)], "names": NAMES}
    await proxy.reload(site.config(models=pool(site), router=router))
    assert (await site.chat(model="router"))[1]["intentd"]["model"] == "big"
    break_file(trained)
    with pytest.raises(ConfigError) as caught:
        await proxy.reload(site.config(models=pool(site), router=router))
    assert caught.value.field == "router.files[0]"
    assert (await site.chat(model="router"))[1]["intentd"]["model"] == "big"


async def test_files_that_are_not_there_are_named(site: Any, trained: Path) -> None:
    with pytest.raises(ConfigError, match="a readable file"):
        await site.start(models=pool(site), router={"files": [str(trained) + "x"]})


async def test_an_own_type_needs_a_router(site: Any) -> None:
    own = {"name": "own", "stages": [{"model": "route"}]}
    with pytest.raises(ConfigError) as caught:
        site.config(service_types=[own])
    assert caught.value.field == "service_types[0].stages[0].model"
