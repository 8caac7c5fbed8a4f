"""A daemon that says what the test says, for the commands of intentctl."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.kit.config import admin_path


class Said:
    """Admin sockets that answer by command, and what they were asked."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.sockets: list[socket.socket] = []

    def serve(self, role: str) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(admin_path(role, self.run)))
        server.listen()
        self.sockets.append(server)
        threading.Thread(target=self._serve, args=(role, server), daemon=True).start()

    def _serve(self, role: str, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                request = json.loads(lines.readline())
                self.asked.append((role, request["command"], request["args"]))
                answer = self.answers.get(request["command"])
                if isinstance(answer, list):  # one after the other
                    answer = answer.pop(0)
                refusal = {"ok": False, "error": "unknown", "code": "unknown_command"}
                if isinstance(answer, str):
                    refusal = {"ok": False, "error": answer, "code": "bad_request"}
                said = {"ok": True, "result": answer} if isinstance(answer, dict) else refusal
                connection.sendall(json.dumps(said).encode() + b"\n")


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(run))
    said = Said(run)
    yield said
    for server in said.sockets:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


Out = Callable[[], tuple[str, str]]


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Out:
    def read() -> tuple[str, str]:
        captured = capsys.readouterr()
        return captured.out, captured.err

    return read
