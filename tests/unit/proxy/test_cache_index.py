"""The vector index against a naive one; the embedder's thread; entries and who goes first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from intentd.proxy.cache import index as index_module
from intentd.proxy.cache.embedder import EmbedError, LocalEmbedder, PoolEmbedder
from intentd.proxy.cache.hot import Hot
from intentd.proxy.cache.index import VectorIndex, compiled_scan, scope_number
from intentd.proxy.store.cache import ItemRow, KeyRow

WIDTH = 12
OWNERS = ("a", "b", "c")
ERROR = 0.02  # of a cosine of so few dimensions in bytes


def unit(seed: int) -> Any:
    vector = np.random.default_rng(seed).standard_normal(WIDTH)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class IndexMachine(RuleBasedStateMachine):
    """Every search finds what looking at all vectors finds, but for the rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.index = VectorIndex(WIDTH)
        self.rows: list[tuple[str, int, int, int, int, Any]] = []
        self.number = 0

    @rule(owner=st.sampled_from(OWNERS), count=st.integers(1, 40), seed=st.integers(0, 10**6))
    def add(self, owner: str, count: int, seed: int) -> None:
        self.number += 1
        for place in range(count):
            row = (owner, self.number, place, place % 3, place % 2, unit(seed + place))
            self.rows.append(row)
            self.index.add(*row)

    @rule(pick=st.integers(0, 100))
    def remove(self, pick: int) -> None:
        items = sorted({(row[0], row[1]) for row in self.rows})
        if not items:
            assert self.index.remove("a", 1) == 0
            return
        owner, item = items[pick % len(items)]
        gone = sum(row[1] == item for row in self.rows)
        assert self.index.remove(owner, item) == gone
        self.rows = [row for row in self.rows if row[1] != item]

    @rule(
        owners=st.lists(st.sampled_from(OWNERS), max_size=3),
        kinds=st.sets(st.integers(0, 2), max_size=2),
        scopes=st.sets(st.integers(0, 1), max_size=2),
        seed=st.integers(0, 10**6),
        least=st.sampled_from([-1.0, 0.2, 0.7]),
        limit=st.integers(1, 5),
        odd=st.booleans(),
    )
    def search(
        self, owners: list[str], kinds: set[int], scopes: set[int], seed: int, least: float,
        limit: int, odd: bool,
    ) -> None:  # fmt: skip
        asked = unit(seed)
        best: dict[int, float] = {}
        for owner, item, _, kind, scope, vector in self.rows:
            fits = owner in owners and (not kinds or kind in kinds)
            fits = fits and (not scopes or scope in scopes) and (item % 2 == 1 or not odd)
            if fits:
                best[item] = max(best.get(item, -2.0), float(vector @ asked))
        found = self.index.search(
            owners, asked, kinds=kinds, scopes=scopes, min_similarity=least, limit=limit,
            allowed=(lambda item: item % 2 == 1) if odd else None,
        )  # fmt: skip
        for match in found:
            assert match.similarity == pytest.approx(best[match.item], abs=ERROR)
        assert len({match.item for match in found}) == len(found)
        sure = sorted((one for one in best.values() if one >= least + ERROR), reverse=True)
        assert len(found) >= min(limit, len(sure))
        for match, naive in zip(found, sorted(best.values(), reverse=True), strict=False):
            assert match.similarity == pytest.approx(naive, abs=ERROR)

    @invariant()
    def counts(self) -> None:
        assert len(self.index) == len(self.rows)
        assert self.index.owners == len({row[0] for row in self.rows})


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("width", [1, 7, 384, 1536, 4096])
def test_the_scan_in_c_and_in_numpy_agree(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled_scan() is None:
        pytest.skip("the scan is not compiled (make kernel)")
    rng = np.random.default_rng(width)
    index = VectorIndex(width)
    for number in range(50):
        vector = rng.standard_normal(width).astype(np.float32)
        index.add("o", number, 0, 0, 0, vector / np.linalg.norm(vector))
    asked = rng.standard_normal(width).astype(np.float32)
    asked /= np.linalg.norm(asked)
    compiled = index.search(["o"], asked, limit=50)
    monkeypatch.setattr(index_module, "compiled_scan", lambda: None)
    assert index.search(["o"], asked, limit=50) == compiled
    assert index.search(["o"], np.zeros(width)) == []
    ones = np.full(width, 1 / np.sqrt(width), np.float32)
    index.add("ones", 1, 0, 0, 0, ones)
    assert index.search(["ones"], ones)[0].similarity == pytest.approx(1, abs=1e-3)


def test_the_scan_refuses_buffers_that_do_not_fit() -> None:
    kernel = compiled_scan()
    if kernel is None:
        pytest.skip("the scan is not compiled (make kernel)")
    rows, query, out = bytes(30), bytes(6), bytearray(40)
    kernel.scan(rows, query, out, 10)
    for given in ((rows, query, out, 11), (rows, bytes(5), out, 1), (rows, b"", out, 1),
                  (rows, query, bytearray(4), 2), (rows, query, out, -1)):  # fmt: skip
        with pytest.raises(ValueError, match="rows"):
            kernel.scan(*given)


def test_scopes_are_numbers_and_nothing_is_zero() -> None:
    assert scope_number("") == 0
    assert 0 < scope_number("a") != scope_number("b")


class Model:
    """Embeds by length, one text a run; waits at the gate when there is one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.fails = False

    def embed(self, texts: Sequence[str], *, batch: int = 32) -> Any:
        assert batch == 1
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.fails:
            raise RuntimeError("no memory")
        self.texts += texts
        return np.array([[len(text), 1.0] for text in texts], np.float32)


async def test_the_embedder_batches_remembers_and_lets_the_urgent_first() -> None:
    model = Model()
    model.gate = threading.Event()
    embedder = LocalEmbedder(lambda: model, max_waiting=40, space="s")
    first = asyncio.ensure_future(embedder.embed(["a"]))
    await asyncio.to_thread(model.entered.wait, 20)
    bulk = asyncio.ensure_future(embedder.embed([f"bulk{n:02}" for n in range(20)], urgent=False))
    urgent = asyncio.ensure_future(embedder.embed(["urgent"]))
    await asyncio.sleep(0)
    with pytest.raises(EmbedError, match="wait already"):
        await embedder.embed(["x"] * 30)
    left = asyncio.ensure_future(embedder.embed(["left"]))
    await asyncio.sleep(0)
    left.cancel()
    model.gate.set()
    rows = await asyncio.gather(first, bulk, urgent)
    assert [len(one) for one in rows] == [1, 20, 1]
    assert model.texts[:2] == ["a", "urgent"]
    assert "left" not in model.texts
    known = embedder.known("urgent")
    assert known is not None
    count = len(model.texts)
    assert (await embedder.embed(["urgent", "a"])).tolist() == [[6, 1], [1, 1]]
    assert len(model.texts) == count
    model.fails = True
    with pytest.raises(EmbedError, match="no memory"):
        await embedder.embed(["new"])
    await embedder.close()


async def test_an_embeddings_model_of_the_pool_is_asked_once_a_text() -> None:
    asked: list[list[str]] = []
    rows: list[list[float]] = []

    async def call(texts: Sequence[str], by: Any) -> list[list[float]]:
        asked.append(list(texts))
        return rows or [[3.0, 4.0] for _ in texts]

    embedder = PoolEmbedder(call, space="pool:e")
    assert (await embedder.embed(["a", "b", "a"]))[0] == pytest.approx([0.6, 0.8])
    await embedder.embed(["b", "c"])
    assert asked == [["a", "b"], ["c"]]
    for wrong in ([[0.0, 0.0]], [[1.0], [1.0]], [[]]):
        rows[:] = wrong
        with pytest.raises(EmbedError):
            await embedder.embed(["d"])


def row(name: str, **fields: Any) -> ItemRow:
    return ItemRow(name, "o", "r", (KeyRow("prompt", name),), **fields)


def test_answers_go_by_use_and_put_objects_never() -> None:
    hot = Hot()
    for name in ("a", "b", "c"):
        hot.add(row(name, scope="s"))
    put = hot.add(row("p", put=True))
    first = hot.by_id("a")
    assert first is not None
    hot.touch(first)
    gone = []
    while (entry := hot.least_used()) is not None:
        gone.append(entry.item_id)
        hot.drop(entry)
        hot.drop(entry)
    assert gone == ["b", "c", "a"]
    assert (len(hot), hot.size_bytes, hot.put_bytes) == (1, put.size_bytes, put.size_bytes)


def test_the_newest_has_the_exact_key_and_deadlines_are_told_once() -> None:
    hot = Hot()
    old = hot.add(row("x", scope="s", expires_wall_s=5.0))
    new = hot.add(ItemRow("y", "o", "r", old_keys := (KeyRow("prompt", "x"),), "s"))
    assert old_keys
    (key,) = new.exact
    assert hot.by_exact(key) is new
    hot.drop(old)
    assert hot.by_exact(key) is new
    hot.add(row("z", scope="s", expires_wall_s=5.0))
    assert [entry.item_id for entry in hot.expired(4.9)] == []
    assert [entry.item_id for entry in hot.expired(5.0)] == ["z"]
    assert hot.expired(9.0) == []


def test_deadlines_of_what_went_before_them_do_not_pile_up() -> None:
    hot = Hot()
    for number in range(5000):
        hot.add(row(str(number), scope="s", expires_wall_s=9.0))
        if len(hot) > 10:
            oldest = hot.least_used()
            assert oldest is not None
            hot.drop(oldest)
    assert len(hot._deadlines) < 1100
    assert {entry.item_id for entry in hot.expired(9.0)} == {str(n) for n in range(4990, 5000)}
