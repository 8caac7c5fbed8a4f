"""The client library as a distribution of its own: built offline, alone in an empty environment."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import intentd

pytestmark = [pytest.mark.real]
CLIENT = Path(__file__).parents[2] / "agent" / "client"


def test_it_installs_without_an_index_and_needs_nothing(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-index", "--quiet", str(CLIENT)],
        check=True,
        timeout=100,
    )
    script = (
        "import importlib.metadata as m, importlib.util as u, intentd_client\n"
        "assert [d.name for d in m.distributions()] == ['intentd-client']\n"
        "assert u.find_spec('intentd') is None\n"
        "flows = intentd_client.Flows('/nowhere/agent.sock')\n"
        "with flows.open(10) as flow: pass\n"
        "print(flow.degraded, m.version('intentd-client'))\n"
    )
    done = subprocess.run(
        [str(python), "-I", "-c", script],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.split() == ["absent", intentd.__version__]


def test_its_version_is_the_suites() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    assert project["version"] == intentd.__version__
