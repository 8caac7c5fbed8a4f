"""Schemathesis against the OpenAPI documents of controller, GPU scheduler and proxy: no answer that
is a defect, none that the document does not know. A short run; `make fuzz-api` is a long one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.real.console.console_suite import TOKENS, Suite

PYTHON = os.environ.get("INTENTD_SCHEMATHESIS_PYTHON", "")
EXAMPLES = os.environ.get("INTENTD_SCHEMATHESIS_EXAMPLES", "2")
PHASES = "fuzzing" if EXAMPLES == "2" else "coverage,fuzzing"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not PYTHON, reason="INTENTD_SCHEMATHESIS_PYTHON is not set (make test-real sets it)"
    ),
    pytest.mark.timeout(3600 if PHASES != "fuzzing" else 300),
]


def test_no_defect_and_no_undocumented_answer(suite: Suite, tmp_path: Path) -> None:
    """The three at a time: most of a short run is schemathesis' own start."""
    program = Path(PYTHON).parent / "schemathesis"
    running = {}
    for role in ("controller", "gpu", "proxy"):
        status = suite.admin(role).call("status")
        address = status["detail"]["api"] if role == "proxy" else status["status_address"]
        command = [
            str(program), "run", f"http://{address}/openapi.json", "--checks", CHECKS,
            "--phases", PHASES, "--max-examples", EXAMPLES, "--seed", "1", "--no-color",
            "--generation-database", "none",
        ]  # fmt: skip
        if role != "proxy":
            command += ["--header", f"Authorization: Bearer {TOKENS['operate']}"]
        with (tmp_path / role).open("w") as said:
            running[role] = subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path)
    try:
        for role, process in running.items():
            status = process.wait()
            text = (tmp_path / role).read_text()
            assert status == 0, f"{role}:\n{text[-6000:]}"
            if PHASES != "fuzzing":
                print(f"{role}: {[line for line in text.splitlines() if 'generated' in line]}")
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    for role in running:
        assert suite.admin(role).call("ready")["ready"], role
