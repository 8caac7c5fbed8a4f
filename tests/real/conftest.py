"""What several tests of real parts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from benchmarks.local_postgres import Postgres, why_not


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    if reason := why_not():
        pytest.skip(reason)
    postgres = Postgres()
    try:
        yield postgres
    finally:
        postgres.close()
