"""The locks: those of setup.cfg, with hashes, and what a wrong one is told."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def locks(tmp_path: Path) -> ModuleType:
    """The tool on a copy of the locks."""
    shutil.copytree(ROOT / "packaging", tmp_path / "packaging")
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    spec = importlib.util.spec_from_file_location("locks", tmp_path / "packaging" / "locks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_locks_are_those_of_setup_cfg(locks: ModuleType) -> None:
    locks.check()


def test_locks_name_no_place_to_download_from() -> None:
    for path in (ROOT / "packaging" / "locks").glob("*.txt"):
        assert "://" not in path.read_text()


def test_every_line_of_an_exported_lock_is_pinned_and_hashed(locks: ModuleType) -> None:
    for extra in locks.extras():
        blocks = locks.export(extra).replace("\\\n", " ").splitlines()
        assert all("==" in block and " --hash=sha256:" in block for block in blocks)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("uvloop==0.23.0", "uvloop==0.23.1", "kit: uvloop==0.23.1 is locked as 0.23.0"),
        ("    uvloop==0.23.0\n", "", "kit: setup.cfg asks for other things"),
        ("gpu-ray =", "gpu-other =", "gpu-ray: no such extra in setup.cfg"),
        ("gpu-ray =", "gpu-other =", "gpu-other: has no lock"),
    ],
)
def test_a_changed_pin_is_told(locks: ModuleType, old: str, new: str, complaint: str) -> None:
    config = Path(locks.HERE).parent / "setup.cfg"
    changed = config.read_text().replace(old, new)
    config.write_text(
        changed.replace("%(gpu-ray)s", f"%({new.split()[0]})s") if " =" in old else changed
    )
    with pytest.raises(locks.LockError, match="make locks") as caught:
        locks.check()
    assert complaint in str(caught.value)


def test_a_missing_hash_is_told(locks: ModuleType) -> None:
    lines = Path(locks.HASHES).read_text().splitlines(keepends=True)
    Path(locks.HASHES).write_text("".join(line for line in lines if "uvloop" not in line))
    with pytest.raises(locks.LockError, match=r"kit: no hash of uvloop==0\.23\.0"):
        locks.check()
    Path(locks.HASHES).write_text("".join([*lines, "abandoned==1 sha256:00\n"]))
    with pytest.raises(locks.LockError, match="nothing uses abandoned==1"):
        locks.check()


def test_an_unknown_extra_is_refused(locks: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert locks.main(["export", "nonsense"]) == 1
    assert "nonsense: no such lock; there are kit" in capsys.readouterr().err
