"""What the console's charts show of the members' answers."""

from __future__ import annotations

from typing import Any

from intentd.controller.console import shapes


def book(cost_nano: int, name: str = "") -> dict[str, Any]:
    row = {
        "day": "2026-11-22", "key": "k", "service_type": "cost", "model": "m", "requests": 1,
        "failed": 0, "in_tokens": 1, "out_tokens": 1, "cost_nano": cost_nano,
    }  # fmt: skip
    return {"books": name, "spend": [row]}


def test_books_that_proxies_share_are_counted_once() -> None:
    books = [book(5, "db"), book(7), book(5, "db"), book(7)]
    own = shapes.own_books(books)
    assert own == [books[0], books[1], books[3]]
    (row,) = shapes.spend(own)["key"]
    assert (row["cost_nano"], row["requests"]) == (19, 3)
    assert shapes.own_books([{}, {}]) == [{}, {}]  # members that gave no answer
