"""A host of its own for each test: a namespace, a peer behind a veth, shapers that are closed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.real.tc.tools import Opener

from intentd.agent.tc.netlink import TrafficControl
from intentd.agent.tc.shaper import ShapingHost
from intentd.testbed import netns


@pytest.fixture
def net() -> Iterator[netns.Topology]:
    reason = netns.unavailable()
    if reason:
        pytest.skip(reason)
    with netns.Topology("ttc") as topology:
        yield topology


@pytest.fixture
def node(net: netns.Topology) -> netns.Namespace:
    node, peer = net.namespace("node"), net.namespace("peer")
    net.pair(node, peer)
    return node


@pytest.fixture
async def host_in(tmp_path: Path) -> AsyncIterator[Opener]:
    hosts: list[ShapingHost] = []

    def make(namespace: netns.Namespace, control: TrafficControl | None = None) -> ShapingHost:
        with namespace.entered():
            hosts.append(ShapingHost(tmp_path / "tc.json", control))
        return hosts[-1]

    yield make
    for host in hosts:
        await host.close()
