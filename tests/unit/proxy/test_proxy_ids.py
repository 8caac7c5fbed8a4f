"""Whose id a request has, and whose name a key may not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.kit.admin import AdminRefusedError
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.store import Store
from intentd.proxy.errors import ApiError
from intentd.proxy.keys import RESERVED, Keys, key_hash
from intentd.proxy.store.base import KeyRow
from intentd.proxy.store.sqlite import MIGRATIONS, SqliteKeys

SAME = {"X-Request-Id": "same-id"}


async def key(site: Any, name: str) -> dict[str, str]:
    made = await site.proxy.admin("keys.new", {"name": name})
    return {"Authorization": f"Bearer {made['secret']}"}


async def test_a_clients_id_that_comes_again_is_the_key_of_nothing(site: Any) -> None:
    await site.start()
    ids = []
    for prompt in ("one", "two", "three"):
        body = {"prompt": prompt, "service_type": "cost", "conversation": "dup"}
        _, answer, headers = await site.post("/v1/request", body, headers=SAME)
        assert headers["X-Request-Id"] == "same-id"
        assert headers["X-Intentd-Request-Id"] == answer["id"]
        ids.append(answer["id"])
    assert len(set(ids)) == 3
    status, error, _ = await site.post("/v1/regenerate", {"id": "same-id"})
    assert (status, error["error"]["param"]) == (404, "id")
    assert (await site.post("/v1/regenerate", {"id": ids[2]}, headers=SAME))[0] == 200
    _, page, _ = await site.get("/v1/conversations/dup")
    assert [message["prompt"] for message in page["messages"]] == ["one", "two", "three"]
    assert [message["id"] for message in page["messages"][:2]] == ids[:2]


async def test_feedback_and_the_log_tell_requests_of_one_name_apart(site: Any) -> None:
    await site.start()
    alice, bob = await key(site, "alice"), await key(site, "bob")
    first = (await site.chat(headers={**alice, **SAME}))[1]["intentd"]["request_id"]
    second = (await site.chat(headers={**alice, **SAME}))[1]["intentd"]["request_id"]
    foreign = (await site.chat(headers={**bob, **SAME}))[1]["intentd"]["request_id"]
    word = {"id": first, "rating": "bad"}
    assert (await site.post("/v1/feedback", word, headers=alice))[0] == 200
    assert (await site.post("/v1/feedback", {**word, "id": "same-id"}, headers=alice))[0] == 404
    _, found, _ = await site.get(f"/v1/requests/{first}", headers=alice)
    assert found["feedback"]["rating"] == "bad"
    _, newest, _ = await site.get("/v1/requests/same-id", headers=alice)
    assert (newest["request_id"], newest["feedback"]) == (second, None)
    assert (await site.get("/v1/requests/same-id", headers=bob))[1]["request_id"] == foreign
    assert (await site.get(f"/v1/requests/{first}", headers=bob))[0] == 404
    explained = await site.proxy.admin("explain", {"id": first})
    assert explained["request_id"] == first
    with pytest.raises(AdminRefusedError, match=f"{foreign} .key bob."):
        await site.proxy.admin("explain", {"id": "same-id"})


async def test_a_clients_id_is_found_on_disk(site: Any) -> None:
    proxy = await site.start()
    first = (await site.chat(headers=SAME))[1]["intentd"]["request_id"]
    await proxy.stop()
    site.proxies.clear()
    await site.start()
    assert (await site.get("/v1/requests/same-id"))[1]["request_id"] == first
    assert (await site.proxy.admin("explain", {"id": "same-id"}))["request_id"] == first


@pytest.mark.parametrize("name", sorted(RESERVED))
async def test_no_key_takes_a_name_of_the_proxys_own(site: Any, name: str) -> None:
    await site.start()
    with pytest.raises(AdminRefusedError, match="name"):
        await site.proxy.admin("keys.new", {"name": name})


async def test_a_key_with_such_a_name_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "db", MIGRATIONS)
    table = SqliteKeys(store)
    hashed = key_hash("sk-intentd-old")
    await table.write(KeyRow("console", hashed, "console", "default", 0.0, None, False, "{}"))
    keys = Keys(table, ManualClock())
    await keys.load()
    assert "proxy's own" in caplog.text
    with pytest.raises(ApiError, match="the name console is the proxy's own"):
        keys.find("sk-intentd-old", required=False)
    assert (await keys.revoke("console")).revoked
    store.close()
