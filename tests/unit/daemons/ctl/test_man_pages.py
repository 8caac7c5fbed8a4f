"""Manual pages: one for the tool, a group and a daemon, and groff finds nothing to say of them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.ctl.daemon import DAEMONS
from intentd.daemons.ctl.main import GROUPS

SOURCE = Path(__file__).parents[4] / "packaging" / "man.py"


def module() -> Any:
    spec = importlib.util.spec_from_file_location("intentd_packaging_man", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_every_command_and_daemon_has_a_page_that_renders() -> None:
    man = module()
    pages = man.pages()
    wanted = {"intentctl.1", *(f"intentctl-{name}.1" for name in GROUPS)}
    wanted |= {f"intentd-{name}.8" for name in (*DAEMONS, "gpu-launcher", "extra")}
    assert set(pages) == wanted
    assert "\\fB\\-\\-min\\-uid\\fR" in pages["intentd-gpu-launcher.8"]
    assert "\\-\\-iterations\\fR VALUE" in pages["intentctl.1"]
    assert ".SS intentctl policy diff [OPTIONS] FIRST [SECOND]" in pages["intentctl-policy.1"]
    assert "\\fBstore.lease_s\\fR" in pages["intentd-controller.8"]
    assert man.roff(".x 'y' a\\b") == "\\&.x \\(aqy\\(aq a\\eb"
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed: pages are not rendered")
    done = subprocess.run(
        [groff, "-man", "-ww", "-z", "-Tutf8"],
        input="".join(pages.values()), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
