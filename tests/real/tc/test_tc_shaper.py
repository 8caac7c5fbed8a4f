"""HTB on the real kernel: applied, read back, changed in place, repaired, given back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.real.tc.tools import SRC, Opener, classes, devices, policy, root_qdisc, without_counters

from intentd.agent.marking import mark
from intentd.agent.tc import plan
from intentd.agent.tc.netlink import KernelThread, TrafficControl
from intentd.agent.tc.shaper import Shaper, Shaping
from intentd.core.errors import PolicyError
from intentd.testbed import netns

pytestmark = [pytest.mark.real, pytest.mark.netns]


async def test_apply_is_what_tc_shows_and_restore_gives_back(
    node: netns.Namespace, host_in: Opener, tmp_path: Path
) -> None:
    host = host_in(node)
    shaper = host.shaper("eth0")
    assert shaper.priority_of(0) == 0
    before = node.tc("qdisc", "show", "dev", "eth0").stdout
    state = await shaper.apply(policy(0.5, 0.3, 0.2))
    assert (state.state, state.reason) == (Shaping.SHAPED, "")
    assert root_qdisc(node) == "htb 2d17:"
    shown = classes(node)
    assert sorted(shown) == ["2d17:1", "2d17:10", "2d17:11", "2d17:12", "2d17:8"]
    assert "rate 495Mbit ceil 1Gbit" in shown["2d17:10"]
    assert "rate 10Mbit ceil 1Gbit" in shown["2d17:8"]
    assert "limit 1000p" in node.tc("qdisc", "show", "dev", "eth0", "parent", "2d17:12").stdout
    assert shaper.priority_of(2) == 0x2D170012
    assert json.loads((tmp_path / "tc.json").read_text())["devices"][0]["kind"] == "noqueue"
    status = shaper.status()
    assert status["state"] == "shaped"
    assert status["link_up"] is True
    assert status["guarded"] is True
    assert [row["role"] for row in status["classes"]] == [
        "link", "unmarked", "class 0", "class 1", "class 2",
    ]  # fmt: skip
    await shaper.restore()
    assert node.tc("qdisc", "show", "dev", "eth0").stdout == before
    assert not (tmp_path / "tc.json").exists()
    assert shaper.priority_of(2) == 0


async def test_a_repair_that_waits_behind_the_last_restoring_does_nothing(
    node: netns.Namespace, host_in: Opener
) -> None:
    host = host_in(node)
    shaper = host.shaper("eth0")
    before = node.tc("qdisc", "show", "dev", "eth0").stdout
    await shaper.apply(policy(0.5, 0.5))
    await asyncio.gather(host.close(), shaper.verify())
    assert node.tc("qdisc", "show", "dev", "eth0").stdout == before
    assert shaper.status()["repairs"] == 0


async def test_changes_are_made_in_place_and_only_where_something_differs(
    node: netns.Namespace, host_in: Opener
) -> None:
    shaper = host_in(node).shaper("eth0")
    await shaper.apply(policy(0.5, 0.3, 0.2))
    made = shaper.status()["changes"]
    await shaper.apply(policy(0.5, 0.3, 0.2))
    assert shaper.status()["changes"] == made
    await shaper.apply(policy(0.5, 0.2, 0.3))
    assert shaper.status()["changes"] == made + 2
    assert "rate 198Mbit" in classes(node)["2d17:11"]
    await shaper.apply(policy(0.6, 0.4))
    assert "2d17:12" not in classes(node)
    await shaper.apply(policy(0.5, 0.3, 0.2, priorities=(0, 1, 2)))
    assert "prio 2" in classes(node)["2d17:12"]
    await shaper.apply(policy(1.0, rate_bps=40e9))
    assert "rate 39600Mbit ceil 40Gbit" in classes(node)["2d17:10"]
    assert await shaper.verify() == shaper.state
    assert shaper.status()["repairs"] == 0


async def test_dscp_filters_for_both_families_follow_the_policy(
    node: netns.Namespace, host_in: Opener
) -> None:
    host = host_in(node)
    shaper = host.shaper("eth0")
    await shaper.apply(policy(0.5, 0.5, dscps=(46, 10)))
    shown = node.tc("filter", "show", "dev", "eth0").stdout
    assert "match b8000000/fc000000 at 1" in shown
    assert "match 02800000/0fc00000 at 0" in shown
    wanted = plan.tree_for(policy(0.5, 0.5, dscps=(46, 10)))
    seen = await host.thread.call(lambda: host.control.read("eth0"))
    assert {f.shape for f in seen.tree.filters} == set(wanted.filters)
    await shaper.apply(policy(0.5, 0.5, dscps=(10, 0)))
    shown = node.tc("filter", "show", "dev", "eth0").stdout
    assert "b8000000" not in shown
    assert len(re.findall(r"flowid 2d17:10", shown)) == 2
    with pytest.raises(PolicyError, match=r"classes\[1\].dscp"):
        await shaper.apply(policy(0.5, 0.5, dscps=(10, 10)))
    assert shaper.state.state is Shaping.SHAPED


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
async def test_packets_land_in_the_class_of_their_mark(
    node: netns.Namespace, net: netns.Topology, host_in: Opener, family: socket.AddressFamily
) -> None:
    shaper = host_in(node).shaper("eth0")
    await shaper.apply(policy(0.5, 0.5, dscps=(46, 10)))
    peer = "10.77.1.2" if family == socket.AF_INET else "fd77:1::2"

    async def sent(priority: int, dscp: int) -> dict[int, int]:
        before = {c.minor: c.sent_packets for c in await shaper.counters()}
        with node.socket(family, socket.SOCK_DGRAM) as sock:
            mark(sock, priority=priority, dscp=dscp)
            for _ in range(50):
                sock.sendto(b"x", (peer, 9))
        after = {c.minor: c.sent_packets for c in await shaper.counters()}
        return {minor: after[minor] - before[minor] for minor in (0x10, 0x11)}

    with (
        net.namespaces["peer"].socket(family, socket.SOCK_DGRAM) as hearing,
        node.socket(family, socket.SOCK_DGRAM) as asking,
    ):
        hearing.bind((peer, 0))
        hearing.settimeout(60)
        asking.sendto(b"x", (peer, hearing.getsockname()[1]))
        hearing.recv(1)  # the neighbour is known from here on
    assert await sent(0, 46) == {0x10: 50, 0x11: 0}
    assert await sent(0, 10) == {0x10: 0, 0x11: 50}
    assert await sent(0, 0) == {0x10: 0, 0x11: 0}
    # the socket's priority beats a filter that matches
    assert await sent(shaper.priority_of(1), 46) == {0x10: 0, 0x11: 50}


async def test_drift_is_told_without_repairing_it(node: netns.Namespace, host_in: Opener) -> None:
    shaper = host_in(node).shaper("eth0")
    assert await shaper.differences() == []
    await shaper.apply(policy(0.7, 0.3))
    assert await shaper.differences() == []
    node.tc(
        *[
            "class",
            "change",
            "dev",
            "eth0",
            "parent",
            "2d17:1",
            "classid",
            "2d17:11",
            "htb",
            "rate",
            "1mbit",
        ]
    )
    (wrong,) = await shaper.differences()
    assert "2d17:11" in wrong
    assert "rate 1Mbit" in classes(node)["2d17:11"]
    node.tc(*["qdisc", "replace", "dev", "eth0", "root", "handle", "7:", "pfifo"])
    (wrong,) = await shaper.differences()
    assert wrong == "eth0 has a root qdisc pfifo that is not the agent's"


async def test_drift_is_repaired_and_a_missing_device_comes_back(
    node: netns.Namespace, net: netns.Topology, host_in: Opener
) -> None:
    shaper = host_in(node).shaper("eth0")
    await shaper.apply(policy(0.7, 0.3))
    node.tc(
        *[
            "class",
            "change",
            "dev",
            "eth0",
            "classid",
            "2d17:10",
            "parent",
            "2d17:1",
            "htb",
            "rate",
            "1mbit",
            "ceil",
            "2mbit",
        ]
    )
    node.tc(*["class", "del", "dev", "eth0", "classid", "2d17:11"])
    assert (await shaper.verify()).state is Shaping.SHAPED
    assert shaper.status()["repairs"] == 3  # two classes, one queue
    assert "rate 693Mbit ceil 1Gbit" in classes(node)["2d17:10"]
    node.tc(*["qdisc", "del", "dev", "eth0", "root"])
    await shaper.verify()
    assert root_qdisc(node) == "htb 2d17:"
    node.ip("link", "set", "eth0", "down")
    await shaper.verify()
    assert shaper.status()["link_up"] is False
    node.ip("link", "del", "eth0")
    state = await shaper.verify()
    assert (state.state, state.reason) == (Shaping.FAILED, "device 'eth0' does not exist")
    assert shaper.priority_of(0) == 0
    net.pair(node, net.namespaces["peer"], left_device="eth0", right_device="eth0")
    assert (await shaper.verify()).state is Shaping.SHAPED
    assert root_qdisc(node) == "htb 2d17:"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        ("link add dev0 type ifb", "pfifo_fast"),
        ("tuntap add dev dev0 mode tap multi_queue", "mq"),
    ],
)
async def test_kernel_defaults_of_real_devices_come_back(
    node: netns.Namespace, host_in: Opener, make: str, kind: str
) -> None:
    if node.ip(*make.split(), check=False).returncode:
        pytest.skip(f"this kernel refuses: ip {make}")
    node.ip("link", "set", "dev0", "up")
    before = root_qdisc(node, "dev0")
    if not before.startswith(kind):
        pytest.skip(f"the default qdisc here is {before}, not {kind}")
    shaper = host_in(node).shaper("dev0")
    assert (await shaper.apply(policy(0.5, 0.5))).state is Shaping.SHAPED
    assert root_qdisc(node, "dev0") == "htb 2d17:"
    state = await shaper.restore()
    assert state.reason == "ordered but unshaped: given back (restored)"
    assert root_qdisc(node, "dev0") == before


async def test_one_device_serves_one_domain(node: netns.Namespace, host_in: Opener) -> None:
    host = host_in(node)
    first, second = host.shaper("eth0"), host.shaper("eth0")
    await first.apply(policy(0.5, 0.5))
    state = await second.apply(policy(1.0))
    assert (state.state, state.reason) == (
        Shaping.FAILED,
        "another domain shapes the egress of eth0",
    )
    await second.restore()
    assert len(classes(node)) == 4
    await first.restore()
    assert (await second.apply(policy(1.0))).state is Shaping.SHAPED


@pytest.mark.parametrize("kind", ["htb", "tbf rate 10mbit burst 16k latency 50ms", "pfifo"])
async def test_foreign_qdisc_is_never_touched(
    node: netns.Namespace, host_in: Opener, tmp_path: Path, kind: str
) -> None:
    node.tc(*f"qdisc add dev eth0 root handle 1: {kind}".split())
    before = without_counters(node)
    host = host_in(node)
    shaper = host.shaper("eth0")
    state = await shaper.apply(policy(0.5, 0.5))
    assert state.state is Shaping.FOREIGN
    assert f"{kind.split()[0]} 1:" in state.reason
    assert shaper.priority_of(0) == 0
    await shaper.verify()
    await shaper.restore()
    assert without_counters(node) == before
    assert not (tmp_path / "tc.json").exists()


async def test_qdisc_put_over_ours_is_left_at_restore(
    node: netns.Namespace, host_in: Opener
) -> None:
    shaper = host_in(node).shaper("eth0")
    await shaper.apply(policy(0.5, 0.5))
    node.tc(*["qdisc", "replace", "dev", "eth0", "root", "handle", "7:", "pfifo"])
    assert (await shaper.verify()).state is Shaping.FOREIGN
    await shaper.restore()
    assert root_qdisc(node) == "pfifo 7:"


async def test_kernel_without_the_qdisc_says_so_once_and_is_unshaped(
    node: netns.Namespace, host_in: Opener, tmp_path: Path
) -> None:
    missing = next(
        (
            kind
            for kind in ("fq", "sfq", "drr", "plug")
            if "unknown" in node.tc("qdisc", "add", "dev", "lo", "root", kind, check=False).stderr
        ),
        None,
    )
    if missing is None:
        pytest.skip("this kernel has every qdisc asked for")
    shaper = host_in(node, TrafficControl(root_kind=missing)).shaper("eth0")
    state = await shaper.apply(policy(0.5, 0.5))
    assert state.state is Shaping.UNSHAPED
    assert state.reason.startswith("ordered but unshaped: InstallRoot on eth0: No such file")
    assert "lacks the qdisc" in state.reason
    assert root_qdisc(node) == "noqueue 0:"
    assert not (tmp_path / "tc.json").exists()


async def test_devices_that_cannot_be(node: netns.Namespace, host_in: Opener) -> None:
    host = host_in(node)
    for device, reason in (
        ("nosuch0", "device 'nosuch0' does not exist"),
        ("a-name-too-long-for-it", "1 to 15 bytes"),
    ):
        state = await host.shaper(device).apply(policy(1.0))
        assert state.state is Shaping.FAILED
        assert reason in state.reason
    state = await host.shaper("").apply(policy(1.0))
    assert (state.state, state.reason) == (
        Shaping.UNSHAPED,
        "ordered but unshaped: no device is configured",
    )


async def test_refused_change_in_place_puts_the_old_tree_back(
    node: netns.Namespace, host_in: Opener
) -> None:
    class RefusesClass(TrafficControl):
        def _make(self, index: int, change: plan.Change) -> None:
            if isinstance(change, plan.PutClass) and change.shape.minor == 0x12:
                # a parent that is not there: the kernel's own refusal
                node.tc(
                    *[
                        "class",
                        "add",
                        "dev",
                        "eth0",
                        "parent",
                        "2d17:99",
                        "classid",
                        "2d17:12",
                        "htb",
                        "rate",
                        "1mbit",
                    ]
                )
            super()._make(index, change)

    shaper = host_in(node, RefusesClass()).shaper("eth0")
    await shaper.apply(policy(0.7, 0.3))
    before = classes(node)
    state = await shaper.apply(policy(0.5, 0.3, 0.2))
    assert state.state is Shaping.FAILED
    assert classes(node) == before


def test_pyroute2_is_imported_without_its_package_file() -> None:
    code = (
        "import sys; from intentd.agent.tc.netlink import TrafficControl as T; t = T();"
        "t.device('lo'); t.read('lo'); t.close();"
        "assert 'pyroute2.iproute.linux' in sys.modules;"
        "assert not {'pyroute2', 'pyroute2.ndb', 'pyroute2.nftables', 'numpy'} & set(sys.modules);"
        "import pyroute2; pyroute2.NDB"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        check=True,
        timeout=60,
    )


async def test_works_beside_a_uvloop_policy(
    node: netns.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvloop

    monkeypatch.setattr(asyncio, "new_event_loop", uvloop.new_event_loop)
    with node.entered():
        thread = KernelThread()
    try:
        reading = await thread.call(lambda: thread.control.read("eth0"))
        assert reading.tree.kind == "noqueue"
        assert reading.device.up
    finally:
        thread.close()


def make_downlink(net: netns.Topology) -> tuple[netns.Namespace, str]:
    receiver = net.namespace("receiver")
    net.star([receiver, net.namespace("s1"), net.namespace("s2")])
    return receiver, "eth0"


async def test_downlink_is_shaped_behind_an_ifb_and_given_back(
    net: netns.Topology, host_in: Opener, tmp_path: Path
) -> None:
    receiver, device = make_downlink(net)
    if receiver.ip("link", "add", "probe", "type", "ifb", check=False).returncode:
        pytest.skip("this kernel has no IFB")
    receiver.ip("link", "del", "probe")
    links = devices(receiver)
    shaper = host_in(receiver).shaper(device, "ingress")
    state = await shaper.apply(policy(0.7, 0.3, dscps=(10, 12)))
    assert (state.state, state.reason) == (Shaping.SHAPED, "")
    ifb = shaper.status()["classes"] and shaper._ifb_name
    assert "rate 950Mbit" in classes(receiver, ifb)["2d17:1"]
    assert shaper.priority_of(0) == 0
    made = shaper.status()["changes"]
    await shaper.apply(policy(0.7, 0.3, dscps=(10, 12)))
    assert shaper.status()["changes"] == made
    assert (await shaper.verify()).state is Shaping.SHAPED
    state = await shaper.apply(policy(0.7, 0.3))
    assert state.state is Shaping.UNSHAPED
    assert "ordered but unshaped: the receiver tells classes by DSCP" in state.reason
    assert devices(receiver) == links
    assert "ingress" not in receiver.tc("qdisc").stdout
    assert not (tmp_path / "tc.json").exists()


async def test_foreign_ingress_is_never_touched(net: netns.Topology, host_in: Opener) -> None:
    receiver, device = make_downlink(net)
    receiver.tc("qdisc", "add", "dev", device, "clsact")
    before = receiver.tc("qdisc").stdout
    shaper: Shaper = host_in(receiver).shaper(device, "ingress")
    state = await shaper.apply(policy(0.7, 0.3, dscps=(10, 12)))
    assert state.state is Shaping.FOREIGN
    assert receiver.tc("qdisc").stdout == before
    assert not any(name.startswith("ifb-") for name in devices(receiver))
