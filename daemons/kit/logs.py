"""Structured logs on standard error: one line per change of state, ids as fields.

``log.info("policy applied", extra={"era": 3, "number": 7})`` writes, as text,
``2026-01-02T03:04:05.678Z INFO agent.daemon policy applied era=3 number=7``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, TextIO

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITY: Final = {
    logging.DEBUG: "<7>",
    logging.INFO: "<6>",
    logging.WARNING: "<4>",
    logging.ERROR: "<3>",
    logging.CRITICAL: "<2>",
}
MAX_FIELD: Final = 4096


def record_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed in ``extra``."""
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_")  # a library's own, as Ray's
    }


def _stamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _origin(record: logging.LogRecord) -> str:
    return record.name.removeprefix("intentd.").removeprefix("daemons.")


class TextFormatter(logging.Formatter):
    """``time LEVEL origin message key=value ...``; line breaks in values are escaped."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        parts = [_origin(record), _escape(record.getMessage())]
        parts += [f"{name}={_field(value)}" for name, value in record_fields(record).items()]
        line = " ".join(parts)
        if self._journal:  # the journal has its own time stamp and level
            line = _PRIORITY.get(record.levelno, "<6>") + line
        else:
            line = f"{_stamp(record)} {record.levelname} {line}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "\n" + trace
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, traceback."""

    def __init__(self, context: Mapping[str, str]) -> None:
        super().__init__()
        self._context = dict(context)

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": _origin(record),
            "message": record.getMessage(),
            **self._context,
        }
        for name, value in record_fields(record).items():
            entry.setdefault(name, value)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _escape(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _field(value: Any) -> str:
    if not isinstance(value, str):  # JSON already: numbers, lists, tables
        return json.dumps(value, default=str)[:MAX_FIELD]
    text = value[:MAX_FIELD]
    plain = text and text.isprintable() and not any(mark in text for mark in ' "=')
    return text if plain else json.dumps(text)


def configure_logging(
    level: str,
    form: str,
    context: Mapping[str, str],
    *,
    stream: TextIO | None = None,
    journal: bool = False,
) -> None:
    """Set up the root logger of a daemon process; calling it again replaces the set-up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    formatter: logging.Formatter
    if form == "json":
        formatter = JsonFormatter(context)
    else:
        formatter = TextFormatter(journal=journal)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full pipe must not end a daemon
    logging.getLogger("asyncio").setLevel(max(logging.INFO, root.level))
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
