import os
from pathlib import Path

from intentd.testbed.awake import is_virtual, processors_awake


def test_spinners_give_way_and_leave() -> None:
    with processors_awake() as found:
        assert len(found) == (len(os.sched_getaffinity(0)) if is_virtual() else 0)
        assert all(os.sched_getscheduler(pid) == os.SCHED_IDLE for pid in found)
        assert sorted(cpu for pid in found for cpu in os.sched_getaffinity(pid)) == sorted(
            os.sched_getaffinity(0) if found else []
        )
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
