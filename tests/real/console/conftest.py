"""The suite is started once for all tests of the console."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.real.console.console_suite import Suite


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    made = Suite(tmp_path_factory.mktemp("console"))
    try:
        made.start()
        yield made
    finally:
        made.close()
