"""Whatever comes in: one OpenAI-shaped error naming the field, and the proxy lives."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import ConfigError
from intentd.daemons.kit.config import validate
from intentd.proxy.config import ProxyConfig
from intentd.proxy.dialects import openai_chat
from intentd.proxy.errors import ApiError

USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": 3}, 400, "model"),
        ({"model": "none"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [USER, 3]}, 400, "messages[1]"),
        ({"messages": [{"role": "pope", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400,
         "messages[0].content[0].text"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {}}, 400, "stream_options"),
        ({"n": 0}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
        ({"service_type": "psychic"}, 400, "service_type"),
        ({"intentd": {"service_typ": "fixed"}}, 400, "intentd.service_typ"),
        ({"intentd": []}, 400, "intentd"),
        ({"api_base": "http://evil"}, 400, "api_base"),
        ({"base_url": "http://evil"}, 400, "base_url"),
    ],
)  # fmt: skip
async def test_the_field_is_named(
    site: Any, fields: dict[str, Any], status: int, param: str
) -> None:
    await site.start()
    got, answer, headers = await site.chat(**fields)
    assert (got, answer["error"]["param"]) == (status, param)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert headers["X-Request-Id"].startswith("req_")
    assert site.provider.requests == []


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b'{"model": "\xff"}', b"[" * 5000, b'{"model": NaN}', b"\0" * 9]
)
async def test_broken_bodies(site: Any, raw: bytes) -> None:
    await site.start()
    async with site.session.post(f"{site.url}/v1/chat/completions", data=raw) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_bounds_of_a_body(site: Any) -> None:
    await site.start(listen={"bind": "127.0.0.1:0", "max_body_bytes": 2048})
    assert (await site.chat(pad="x" * 3000))[0] == 413

    async def chunks() -> Any:
        for _ in range(8):
            yield b"x" * 1000

    async with site.session.post(f"{site.url}/v1/chat/completions", data=chunks()) as response:
        assert response.status == 413
        assert "error" in await response.json()
    assert (await site.chat())[0] == 200


async def test_paths_methods_and_headers(site: Any) -> None:
    await site.start()
    assert (await site.get("/v1/nothing"))[0] == 404
    status, said, headers = await site.get("/v1/chat/completions")
    assert (status, said["error"]["type"]) == (405, "invalid_request_error")
    assert headers["Allow"] == "POST"
    status, answer, _ = await site.chat(headers={"X-Intentd-Service-Type": "a b"})
    assert (status, answer["error"]["param"]) == (400, "X-Intentd-Service-Type")
    _, _, headers = await site.chat(headers={"X-Request-Id": "not an id!"})
    assert headers["X-Request-Id"].startswith("req_")
    status, answer, _ = await site.chat(headers={"X-Intentd-Service-Type": "fixed"})
    assert status == 200


async def test_a_prompt_over_every_window(site: Any) -> None:
    await site.start(models=[site.model("m", window=100)])
    status, answer, _ = await site.chat(messages=[{"role": "user", "content": "x " * 2000}])
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


FIELDS = (
    "model", "messages", "stream", "stream_options", "n", "max_tokens", "prompt", "input",
    "best_of", "service_type", "intentd",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_readers_refuse_or_accept(body: dict[str, Any]) -> None:
    for read in (openai_chat.read_chat, openai_chat.read_completion, openai_chat.read_embeddings):
        try:
            call = read(orjson.dumps(body), "")
        except ApiError as refused:
            orjson.dumps(refused.document())
        else:
            assert call.size_bytes >= 0


async def test_random_bytes_on_the_socket(site: Any) -> None:
    await site.start()
    rng = random.Random(4)
    host, port = site.proxy.address.split(":")
    for _ in range(60):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(rng.randbytes(rng.randrange(1, 400)) + b"\r\n\r\n")
        writer.write_eof()
        await reader.read(200)
        writer.close()
    assert (await site.chat())[0] == 200


POOL: dict[str, Any] = {"models": [{"name": "a", "base_url": "http://x"}]}


def test_prices_may_be_numbers() -> None:
    row = {"name": "a", "base_url": "http://x", "price_in": 0.15, "price_out": 3}
    (model,) = validate(ProxyConfig, {"models": [row]}).models
    (price,) = model.history()
    assert (price.in_nano, price.out_nano) == (150_000_000, 3_000_000_000)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"models": [{"name": "a b", "base_url": "http://x/v1"}]}, "models[0].name"),
        ({"models": [{"name": "a", "base_url": "ftp://x"}]}, "models[0].base_url"),
        ({"models": [{"name": "a", "base_url": "http://x:80}v1"}]}, "models[0].base_url"),
        ({"models": [{"name": "a", "base_url": "http://[x/v1"}]}, "models[0].base_url"),
        ({"models": [{"name": "a", "base_url": "http://u:p@x/"}]}, "models[0].base_url"),
        ({"models": [{"name": "a", "base_url": "http://x", "price_in": "-1"}]},
         "models[0].price_in"),
        ({"models": [{"name": "a", "base_url": "http://x", "api_key_env": "sk-123"}]},
         "models[0].api_key_env"),
        ({"models": [{"name": "a", "base_url": "http://x"}] * 2}, "models[1].name"),
        ({"models": [{"name": "a", "base_url": "http://x", "fallbacks": ["b"]}]},
         "models[0].fallbacks[0]"),
        ({"listen": {"bind": "0.0.0.0:80"}}, "listen.bind"),
        ({"budgets": [{"limit": "x"}]}, "budgets[0].limit"),
        ({"budgets": [{"limit": "1", "unit": "euros"}]}, "budgets[0].unit"),
        ({"budgets": [{"limit": "1", "period": "week"}]}, "budgets[0].period"),
        ({"upstream": {"attempts": 0}}, "upstream.attempts"),
        ({"models": [{"name": "a", "base_url": "http://x", "price_in": -0.5}]},
         "models[0].price_in"),
        ({**POOL, "service_types": [
            {"name": "t", "stages": [{"model": "verify", "verifier": "b"}]}]},
         "service_types[0].stages[0].verifier"),
        ({**POOL, "service_types": [{"name": "t", "stages": [{"model": "one", "models": "b"}]}]},
         "service_types[0].stages[0].models"),
        ({**POOL, "service_types": [{"name": "a", "stages": [{"model": "one"}]}]},
         "service_types[0].name"),
    ],
)  # fmt: skip
def test_configuration_errors_carry_their_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ProxyConfig, fields)
    assert caught.value.field == path
    assert "sk-123" not in str(caught.value)


async def test_a_missing_provider_key_is_named(site: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\[0\]\.api_key_env"):
        await site.start(models=[site.model("m", api_key_env="INTENTD_NOT_SET")])


async def test_reload_changes_the_pool_or_nothing(site: Any) -> None:
    proxy = await site.start()
    await proxy.reload(site.config(models=[site.model("new")]))
    assert (await site.chat())[0] == 404
    assert (await site.chat(model="new"))[0] == 200
    with pytest.raises(ConfigError):
        await proxy.reload(site.config(models=[site.model("x", api_key_env="INTENTD_NOT_SET")]))
    assert (await site.chat(model="new"))[0] == 200
