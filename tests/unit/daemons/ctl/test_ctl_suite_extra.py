"""``make up`` installs the extra ``suite`` alone: nothing that it starts needs more."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

from intentd.daemons.ctl.daemon import DAEMONS
from intentd.daemons.ctl.up import ROLES

ROOT = Path(__file__).parents[4]
STARTED = (
    *(DAEMONS[role] for role in (*ROLES, "proxy")),
    "intentd.controller.console.render",
    *(f"intentd.daemons.ctl.{name}" for name in (
        "main", "up", "status", "flows", "sim", "policy", "tc", "testbed", "jobs",
    )),
    *(f"intentd.testbed.{name}" for name in ("live", "main_job", "report", "runner")),
)  # fmt: skip
IMPORTED_AS = {"pyyaml": "yaml", "pyzmq": "zmq"}


def modules_of(extra: str) -> set[str]:
    """The names that an extra's requirements are imported by."""
    setup = configparser.ConfigParser(interpolation=configparser.BasicInterpolation())
    setup.read(ROOT / "setup.cfg")
    names = re.findall(r"^([\w.-]+)==", setup["options.extras_require"][extra], re.MULTILINE)
    return {IMPORTED_AS.get(name.lower(), name.lower().replace("-", "_")) for name in names}


def test_the_suite_and_its_main_job_import_nothing_outside_their_extra() -> None:
    others = modules_of("dev") - modules_of("suite")
    assert {"pymoo", "lightgbm", "asyncpg"} <= others
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(others)!r}: sys.modules[name] = None\n"  # importing it now fails
        f"for name in {STARTED!r}: importlib.import_module(name)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
