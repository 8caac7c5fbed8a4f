import os
import subprocess

from intentd.testbed.awake import is_virtual, processors_awake


def spinners() -> list[int]:
    listed = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "getppid" in line]


def test_spinners_give_way_and_leave() -> None:
    with processors_awake():
        found = spinners()
        assert len(found) == (len(os.sched_getaffinity(0)) if is_virtual() else 0)
        assert all(os.sched_getscheduler(pid) == os.SCHED_IDLE for pid in found)
    assert spinners() == []
