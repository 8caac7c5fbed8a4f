"""Keys, budgets and books of the proxy."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.unit.proxy.provider import Script

from intentd.core.errors import InputError, IntentdError
from intentd.core.prompts.budgets import BudgetRule
from intentd.daemons.ctl.prompts import parse_budget
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.lifecycle import Tasks
from intentd.daemons.kit.store import Store, StoreError
from intentd.proxy.errors import ApiError
from intentd.proxy.keys import PREFIX
from intentd.proxy.ledger import Ledger
from intentd.proxy.proof import prove_books, since
from intentd.proxy.store.base import Purpose, Sums
from intentd.proxy.store.sqlite import MIGRATIONS

PURPOSE = Purpose("k", "t", "m", "fixed")


async def new_key(site: Any, name: str = "alice", **grants: Any) -> dict[str, str]:
    made = await site.proxy.admin("keys.new", {"name": name, "grants": grants})
    assert made["secret"].startswith(PREFIX)
    return {"Authorization": f"Bearer {made['secret']}"}


async def accounts(site: Any) -> dict[str, Any]:
    page = await site.proxy.admin("spend", {})
    return {row["account"]: row for row in page["accounts"]}


async def test_keys_are_required_hashed_and_revoked(site: Any) -> None:
    await site.start(keys={"required": True})
    assert (await site.chat())[0] == 401
    status, answer, headers = await site.chat(headers={"Authorization": "Bearer wrong"})
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert headers["WWW-Authenticate"] == "Bearer"
    auth = await new_key(site)
    assert (await site.chat(headers=auth))[0] == 200
    secret = auth["Authorization"].split()[1]
    assert (await site.chat(headers={"x-api-key": secret}))[0] == 200
    for path in (site.base / "state").glob("proxy.sqlite*"):
        assert secret.encode() not in path.read_bytes()
    await site.proxy.admin("keys.revoke", {"name": "alice"})
    assert (await site.chat(headers=auth))[0] == 401


async def test_a_revoked_key_is_not_taken_for_anonymous(site: Any) -> None:
    await site.start()
    auth = await new_key(site)
    assert (await site.chat(headers={"Authorization": "Bearer sk-anything"}))[0] == 200
    await site.proxy.admin("keys.revoke", {"name": "alice"})
    assert (await site.chat(headers=auth))[0] == 401
    assert (await site.chat(headers={"Authorization": f"Bearer {PREFIX}x"}))[0] == 401


async def test_keys_outlive_a_restart(site: Any) -> None:
    proxy = await site.start(keys={"required": True})
    auth = await new_key(site, models=["m"], budgets=[{"unit": "dollars", "limit": "1"}])
    await proxy.stop()
    site.proxies.clear()
    await site.start(keys={"required": True})
    assert (await site.chat(headers=auth))[0] == 200
    found = await site.proxy.admin("keys", {})
    assert found["keys"][0]["budgets"][0]["limit"] == 10**9


async def test_a_key_is_bound_to_models_and_service_types(site: Any) -> None:
    await site.start(models=[site.model("m"), site.model("dear")])
    auth = await new_key(site, models=["m"], service_types=["fixed"])
    assert (await site.chat(headers=auth))[0] == 200
    status, answer, _ = await site.chat(headers=auth, model="dear")
    assert (status, answer["error"]["param"]) == (404, "model")
    _, listed, _ = await site.get("/v1/models", headers=auth)
    assert [row["id"] for row in listed["data"]] == ["m"]
    other = await new_key(site, "bob", service_types=["cost"])
    assert (await site.chat(headers=other))[0] == 403


async def test_grants_that_this_proxy_cannot_give_are_refused(site: Any) -> None:
    await site.start()
    for grants, said in (
        ({"models": ["nosuch"]}, "models: got 'nosuch', expected of m"),
        ({"service_types": ["nosuch"]}, "service_types: got 'nosuch'"),
    ):
        with pytest.raises(AdminRefusedError, match=said):
            await site.proxy.admin("keys.new", {"name": "alice", "grants": grants})
    assert (await site.proxy.admin("keys", {}))["keys"] == []


async def test_limits_of_a_key_are_lifted_and_moved(site: Any) -> None:
    await site.start()
    auth = await new_key(
        site, models=["m"], rate={"per_second": 0.1, "burst": 1},
        budgets=[{"unit": "requests", "limit": "1"}],
    )  # fmt: skip
    results = [(await site.chat(headers=auth))[0] for _ in range(2)]
    assert results == [200, 429]
    lifted = {"models": [], "rate": None, "budgets": []}
    args = {"name": "alice", "grants": lifted, "tenant": "lab", "expires_wall_s": 2e12}
    changed = (await site.proxy.admin("keys.change", args))["key"]
    assert (changed["tenant"], changed["expires_wall_s"], changed["rate"]) == ("lab", 2e12, None)
    assert [(await site.chat(headers=auth))[0] for _ in range(2)] == [200, 200]
    await site.proxy.admin("keys.change", {"name": "alice", "expires_wall_s": 1.0})
    assert (await site.chat(headers=auth))[0] == 401
    kept = await site.proxy.admin("keys.change", {"name": "alice", "expires_wall_s": None})
    assert kept["key"]["tenant"] == "lab"
    assert (await site.chat(headers=auth))[0] == 200


async def test_metadata_of_others_is_not_shown(site: Any) -> None:
    await site.start()
    alice, bob = await new_key(site), await new_key(site, "bob")
    await site.chat(headers={**alice, "X-Request-Id": "r1"})
    assert (await site.get("/v1/requests/r1", headers=bob))[0] == 404
    assert (await site.get("/v1/requests/r1", headers=alice))[0] == 200


async def test_rate_limit_says_when(site: Any) -> None:
    await site.start()
    auth = await new_key(site, rate={"per_second": 0.1, "burst": 2})
    results = [await site.chat(headers=auth) for _ in range(3)]
    assert [result[0] for result in results] == [200, 200, 429]
    assert 8 <= int(results[2][2]["Retry-After"]) <= 10


async def test_budget_is_reserved_capped_and_settled(site: Any) -> None:
    await site.start(models=[site.model("m", max_output_tokens=100)])
    auth = await new_key(site, budgets=[{"unit": "dollars", "limit": "0.01"}])
    status, answer, _ = await site.chat(headers=auth)
    assert status == 200
    assert site.provider.requests[0]["max_tokens"] == 100
    row = (await accounts(site))["key:alice/nano_dollars/total"]
    assert row["spent"] == answer["intentd"]["cost_nano"] > 0
    assert row["reserved"] == 0
    await site.chat(headers=auth, max_completion_tokens=2)
    assert site.provider.requests[1]["max_completion_tokens"] == 2
    assert "max_tokens" not in site.provider.requests[1]


async def test_budget_refuses_before_anything_is_sent(site: Any) -> None:
    await site.start(
        budgets=[{"scope": "tenant:default", "unit": "tokens", "limit": "50", "period": "day"}]
    )
    status, answer, _ = await site.chat()
    assert (status, answer["error"]["code"]) == (429, "insufficient_quota")
    assert "tenant:default/tokens/" in answer["error"]["message"]
    assert site.provider.requests == []


async def test_what_may_have_been_billed_is_booked_in_full(site: Any) -> None:
    await site.start(upstream={"attempts": 1, "idle_timeout_s": 5})
    auth = await new_key(site, budgets=[{"unit": "dollars", "limit": "1"}])
    site.provider.scripts = [Script(status=500), Script(cut_after=20), Script(no_usage=True)]
    await site.chat(headers=auth)
    row = (await accounts(site))["key:alice/nano_dollars/total"]
    assert (row["spent"], row["reserved"]) == (0, 0)  # an error is not billed
    _, answer, _ = await site.chat(headers=auth)
    assert answer["error"]["code"] == "upstream_cut"
    first = (await accounts(site))["key:alice/nano_dollars/total"]["spent"]
    assert first > 4096 * 10_000  # the whole reservation
    status, answer, _ = await site.chat(headers=auth)
    assert status == 200
    assert answer["intentd"]["estimated"]
    assert (await accounts(site))["key:alice/nano_dollars/total"]["spent"] == 2 * first


async def test_budget_holds_under_concurrency(site: Any) -> None:
    await site.start(models=[site.model("m", max_output_tokens=3, price_out="1000")])
    limit_nano = 20_000_000
    auth = await new_key(site, budgets=[{"unit": "dollars", "limit": "0.02"}])
    results = await asyncio.gather(*(site.chat(headers=auth) for _ in range(60)))
    statuses = {result[0] for result in results}
    assert statuses == {200, 429}
    provider = site.provider
    bill_nano = provider.bill_in * 1000 + provider.bill_out * 1_000_000
    row = (await accounts(site))["key:alice/nano_dollars/total"]
    assert bill_nano == row["spent"] <= limit_nano
    assert row["reserved"] == 0


async def test_spend_is_summed(site: Any) -> None:
    proxy = await site.start()
    auth = await new_key(site)
    for _ in range(3):
        await site.chat(headers=auth)
    site.provider.scripts = [Script(status=500), Script()]
    await site.chat(headers=auth)
    await proxy.api.ledger.flush()
    (row,) = (await proxy.admin("spend", {"days": 1}))["rows"]
    assert (row["key"], row["requests"], row["failed"]) == ("alice", 5, 1)
    assert row["cost_nano"] == site.provider.bill_in * 1000 + site.provider.bill_out * 10_000


async def test_admin_refuses_nonsense(site: Any) -> None:
    await site.start()
    await new_key(site)
    for command, args in (
        ("keys.new", {}),
        ("keys.new", {"name": "alice"}),
        ("keys.new", {"name": "a b"}),
        ("keys.new", {"name": "c", "grants": {"budgets": [{"unit": "euros", "limit": "1"}]}}),
        ("keys.new", {"name": "c", "grants": {"rate": {"per_second": 0, "burst": 1}}}),
        ("keys.new", {"name": "c", "grants": {"modes": []}}),
        ("keys.revoke", {"name": "nobody"}),
        ("spend", {"days": 0}),
    ):
        with pytest.raises(AdminRefusedError):
            await site.proxy.admin(command, args)


async def test_one_proxy_a_ledger(site: Any) -> None:
    first = await site.start()
    with pytest.raises(IntentdError, match="in use by another proxy"):
        await site.start()
    site.proxies = [first]


async def test_the_disk_refuses(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await site.start()
    auth = await new_key(site, budgets=[{"unit": "requests", "limit": "2"}])
    write = Ledger._write

    def fail(self: Ledger, store: Store, *rest: Any) -> None:
        with store.transaction():
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Ledger, "_write", fail)
    status, answer, _ = await site.chat(headers=auth)
    assert status == 503
    assert "disk is full" in answer["error"]["message"]
    assert "disk is full" in proxy.unready()[0]
    assert site.provider.requests == []
    assert (await site.chat())[0] == 200  # who has no budget is not held up
    monkeypatch.setattr(Ledger, "_write", write)
    assert (await site.chat(headers=auth))[0] == 200
    assert proxy.unready() == []
    assert (await accounts(site))["key:alice/requests/total"]["spent"] == 1


class Books:
    """A ledger on a file, opened again after a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = ManualClock()

    def open(self) -> Ledger:
        self.store = Store(self.path, MIGRATIONS)
        ledger = Ledger(self.store, self.clock, max_rows=10)
        ledger.open()
        return ledger


async def test_open_reservations_settle_in_full_after_a_kill(tmp_path: Path) -> None:
    books = Books(tmp_path / "x.sqlite")
    rule = BudgetRule("key:k", "nano_dollars", 1000)
    async with Tasks() as tasks:
        ledger = books.open()
        tasks.create_task(ledger.run())
        first = await ledger.reserve("r1", [rule], {"nano_dollars": 400}, PURPOSE)
        await ledger.reserve("r2", [rule], {"nano_dollars": 500}, PURPOSE)
        with pytest.raises(ApiError, match="100 nano_dollars left"):
            await ledger.reserve("r3", [rule], {"nano_dollars": 200}, PURPOSE)
        ledger.settle(first, {"nano_dollars": 10})
        await ledger.flush()
        tasks.cancel_all()
    books.store.close()  # nothing said goodbye
    ledger = books.open()
    assert ledger.recovered == 1
    (account,) = await ledger.accounts()
    assert (account.spent, account.reserved) == (510, 0)
    (row,) = await ledger.spend(30)
    assert (row["estimated_nano"], row["failed"]) == (500, 1)
    assert books.open().recovered == 0


async def test_periods_pass(tmp_path: Path) -> None:
    books = Books(tmp_path / "x.sqlite")
    rule = BudgetRule("key:k", "requests", 1, "day")
    async with Tasks() as tasks:
        ledger = books.open()
        tasks.create_task(ledger.run())
        held = await ledger.reserve("r1", [rule], {"requests": 1}, PURPOSE)
        ledger.settle(held, {"requests": 1})
        with pytest.raises(ApiError):
            await ledger.reserve("r2", [rule], {"requests": 1}, PURPOSE)
        await ledger.flush()
        books.clock.advance(86400)
        await ledger.reserve("r3", [rule], {"requests": 1}, PURPOSE)
        assert len(await ledger.accounts()) == 1
        tasks.cancel_all()


async def test_the_request_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intentd.proxy.ledger.PRUNE_EVERY", 5)
    ledger = Books(tmp_path / "x.sqlite").open()
    for number in range(30):
        ledger.log_request(f"r{number}", "k", 0.0, json.dumps({"n": number}).encode())
        await ledger.flush()
    assert await ledger.find_request("r0", "k") == []
    assert await ledger.find_request("r29", "k") == ['{"n": 29}']
    assert await ledger.find_request("r29", "other") == []
    assert await ledger.find_request("r29", None) == ['{"n": 29}']


async def test_books_that_are_not_what_receipts_say_are_told(tmp_path: Path) -> None:
    books = Books(tmp_path / "x.sqlite")
    rule = BudgetRule("key:k", "nano_dollars", 1000, "total")
    async with Tasks() as tasks:
        ledger = books.open()
        tasks.create_task(ledger.run())
        await ledger.reserve("open", [rule], {"nano_dollars": 30}, PURPOSE)
        ledger.book(PURPOSE, Sums(1, 0, 1, 1, 70, 0))
        receipt = json.dumps({"cost_nano": 70}).encode()
        ledger.log_request("r1", "k", books.clock.wall(), receipt)
        await ledger.flush()

        async def wrong() -> list[str]:
            claims = await prove_books(ledger._store, *since(books.clock.wall()))
            assert {claim.check for claim in claims} == {"ledger-reserved", "ledger-receipts"}
            return [f"{claim.check}: {claim.evidence}" for claim in claims if not claim.holds]

        assert await wrong() == []
        with ledger._store.transaction() as db:
            db.execute("UPDATE spend SET cost_nano = 60")
        (said,) = await wrong()
        assert said.startswith("ledger-receipts: 70 nano-dollars on 1 receipts, 60 booked")
        with ledger._store.transaction() as db:
            db.execute("UPDATE spend SET cost_nano = 70")
            db.execute("DELETE FROM reservations")
        (said,) = await wrong()
        assert "30 reserved, 0 in open reservations" in said
        tasks.cancel_all()


async def test_failed_writes_lose_no_spend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Books(tmp_path / "x.sqlite").open()
    ledger.book(PURPOSE, Sums(requests=1, cost_nano=5))
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise StoreError("no disk")

        patch.setattr(Ledger, "_write", fail)
        assert not await ledger.flush()
    ledger.book(PURPOSE, Sums(requests=1, cost_nano=7))
    await ledger.close()
    assert (await ledger.spend(1))[0]["cost_nano"] == 12


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("5", ("dollars", "5", "total")),
        ("0.50/day", ("dollars", "0.50", "day")),
        ("20000tokens/month", ("tokens", "20000", "month")),
        ("100 requests", ("requests", "100", "total")),
    ],
)
def test_budgets_as_operators_write_them(text: str, plain: tuple[str, str, str]) -> None:
    assert tuple(parse_budget(text).values()) == plain


def test_a_wrong_period_is_named() -> None:
    with pytest.raises(InputError, match="budget"):
        parse_budget("5/week")
