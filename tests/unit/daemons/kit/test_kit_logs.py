"""Log lines: one a change of state, ids as fields, nothing breaks the line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.daemons.kit.logs import JsonFormatter, TextFormatter, configure_logging, record_fields


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = before[0], before[2]
    root.setLevel(before[1])
    logging.captureWarnings(False)


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "intentd.agent.gate", "levelno": 20, "levelname": "INFO"})
    made.msg = message
    vars(made).update(fields)
    return made


def test_text_has_fields_as_key_value() -> None:
    line = TextFormatter().format(record("released", flow=3, why="a b", ids=[1, 2]))
    assert line.endswith('Z INFO agent.gate released flow=3 why="a b" ids=[1, 2]')


@given(st.text(), st.text())
def test_no_value_breaks_a_line(message: str, value: str) -> None:
    entry = record("x", value=value, message_=message)
    assert len(TextFormatter().format(entry).splitlines()) == 1
    assert json.loads(JsonFormatter({"role": "agent"}).format(entry))["value"] == value


def test_json_carries_context_fields_and_traceback() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", {"role": "agent", "name": "a"}, stream=stream)
    log = logging.getLogger("intentd.agent.gate")
    log.debug("not shown")
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("failed", extra={"flow": 7})
    entry = json.loads(stream.getvalue())
    assert (entry["role"], entry["name"], entry["flow"]) == ("agent", "a", 7)
    assert "ValueError: boom" in entry["traceback"]


def test_the_journal_gets_priorities_instead_of_time() -> None:
    line = TextFormatter(journal=True).format(record("x"))
    assert line == "<6>agent.gate x"


def test_what_libraries_keep_on_records_is_not_shown() -> None:
    assert record_fields(record("x", _ray_timestamp_ns=1, flow=2)) == {"flow": 2}
