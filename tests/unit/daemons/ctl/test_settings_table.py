"""docs/operations.md: the tables of settings are those of the models."""

from __future__ import annotations

from pathlib import Path

import pytest

from intentd.core.errors import ConfigError
from intentd.daemons.ctl.daemon import settings_table
from intentd.daemons.kit.settings import with_settings

DOCUMENT = Path(__file__).parents[4] / "docs" / "operations.md"


@pytest.mark.parametrize("role", ["common", "agent", "sequencer", "controller", "gpu", "proxy"])
def test_the_table_is_up_to_date(role: str) -> None:
    text = DOCUMENT.read_text()
    assert text == with_settings(text, role, settings_table(role)), (
        f"run: intentctl config {role} --update docs/operations.md"
    )


def test_missing_markers_are_named() -> None:
    with pytest.raises(ConfigError, match="settings: agent"):
        with_settings("# nothing\n", "agent", "")
