"""The file of a role's settings: complete, without effect as it is, valid when uncommented."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from intentd.daemons.ctl.daemon import DAEMONS, daemon_class
from intentd.daemons.kit.config import load_config
from intentd.daemons.kit.config_example import example
from intentd.daemons.kit.settings import describe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def paths(document: Any, prefix: str = "") -> set[str]:
    if isinstance(document, dict):
        return {prefix} | {
            found
            for key, value in document.items()
            for found in paths(value, f"{prefix}.{key}" if prefix else key)
        }
    if isinstance(document, list) and document:
        return {prefix} | {found for item in document for found in paths(item, f"{prefix}[]")}
    return {prefix}


@pytest.mark.parametrize("role", DAEMONS)
def test_the_file_names_every_setting(role: str, tmp_path: Any) -> None:
    model = daemon_class(role).config_model
    text = example(model, role)
    assert tomllib.loads(text) == {}
    file = tmp_path / "example.toml"
    file.write_text(text)
    assert load_config(model, file, {}) == load_config(model, None, {})
    written = paths(tomllib.loads(re.sub(r"^#(?! )", "", text, flags=re.MULTILINE)))
    assert {row.path for row in describe(model) if row.kind != "tables"} <= written
    assert all(len(line) <= 100 for line in text.splitlines() if line.startswith("# "))
