"""Files of labelled texts."""

from __future__ import annotations

from typing import Any

import pytest

from intentd.controller.search.prompts_data import labelled
from intentd.core.errors import InputError


@pytest.mark.parametrize(
    "row", [{"text": "x"}, {"a": "x"}, {"turns": []}, {"text": 1.5, "label": 2}]
)
def test_rows_without_labels_or_pairs_are_named(row: dict[str, Any]) -> None:
    good: list[dict[str, Any]] = [{"text": "x", "label": 3}, {"a": "x", "b": "y"}]
    assert labelled(good, "f") == good
    with pytest.raises(InputError, match=r"f\.jsonl: row 3: got"):
        labelled([*good, row], "f.jsonl")
