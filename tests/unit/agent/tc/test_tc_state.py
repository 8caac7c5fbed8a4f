"""The record of what was found: durable, whole, and refused when it is not ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.agent.tc import restore, state
from intentd.agent.tc.netlink import TrafficControl
from intentd.agent.tc.state import AgentAliveError, Found, Owner, Record, StateFile
from intentd.core.errors import InputError

FOUND = Found("eth0", "egress", 3, 4026531840, "mq", 0, ("mq 00000000 parent ffffffff",))
DEAD = Owner(2**22 - 1, 1)


def record(*devices: Found, owner: Owner = DEAD, boot: str = "b") -> Record:
    return Record(boot, owner, devices)


def test_what_is_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "deep" / "tc.json")
    with file.locked():
        assert file.load() is None
        file.save(record(FOUND))
        assert file.load() == record(FOUND)
    assert sorted(os.listdir(file.path.parent)) == ["tc.json", "tc.json.lock"]
    assert file.path.stat().st_mode & 0o777 == 0o600
    with file.locked():
        file.save(record())
    assert not file.path.exists()


def test_owner_is_told_from_a_later_process_of_the_same_pid() -> None:
    me = Owner.current()
    assert me.alive
    assert not Owner(me.pid, me.start_ticks - 1).alive
    me.yield_or_raise()
    DEAD.yield_or_raise()
    child = subprocess.Popen(["sleep", "60"])
    try:
        other = Owner(child.pid, state._start_ticks(child.pid) or 0)
        with pytest.raises(AgentAliveError, match=str(child.pid)):
            other.yield_or_raise()
    finally:
        child.kill()
        child.wait()
    assert not other.alive


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 2}, "version"),
        ({"owner": {"pid": "1", "start_ticks": 1}}, "owner.pid"),
        ({"owner": {"pid": True, "start_ticks": 1}}, "owner.pid"),
        ({"owner": None}, "owner"),
        ({"boot": 1}, "tc.json"),
        ({"devices": {}}, "tc.json"),
        ({"devices": [{}]}, "devices[0]"),
        ({"extra": 1}, "tc.json"),
    ],
)
def test_wrong_files_are_refused_with_the_place(change: dict[str, object], where: str) -> None:
    plain = {"version": 1, "boot": "b", "owner": {"pid": 1, "start_ticks": 1}, "devices": []}
    with pytest.raises(InputError) as caught:
        state.parse(json.dumps(plain | change).encode(), "tc.json")
    assert where in caught.value.field


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["version", "boot", "owner", "devices", "pid", "x"]), inner, max_size=5
    ),
).map(lambda plain: json.dumps(plain).encode()))  # fmt: skip
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    with pytest.raises(InputError):
        state.parse(data, "tc.json")


def test_after_a_reboot_there_is_nothing_to_undo(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "tc.json")
    file.save(record(FOUND, boot="an earlier boot"))
    outcomes = restore.restore_all(file, TrafficControl())
    assert [(o.device, o.outcome, o.detail) for o in outcomes] == [("eth0", "clean", "rebooted")]
    assert not file.path.exists()


def test_devices_of_another_namespace_stay_recorded(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "tc.json")
    elsewhere = Found("eth0", "egress", 3, 1, "mq", 0)
    file.save(record(elsewhere, boot=state.boot_id()))
    outcomes = restore.restore_all(file, TrafficControl())
    assert [o.outcome for o in outcomes] == ["elsewhere"]
    assert file.load() == record(elsewhere, boot=state.boot_id())


def test_restore_command_without_a_file_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert restore.main(["--state", str(tmp_path / "none.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"devices": []}
    bad = tmp_path / "bad.json"
    bad.write_text("[")
    assert restore.main(["--state", str(bad)]) == 2
    assert "JSON" in capsys.readouterr().err
