"""The fault campaign itself: a few faults into real processes, and what its judges see."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from benchmarks.chaos.__main__ import numbers
from benchmarks.chaos.campaign import Campaign, Options
from benchmarks.chaos.faults import KINDS, draw
from benchmarks.chaos.prompts import judge
from benchmarks.chaos.provider import Asked
from benchmarks.chaos.relay import TcpLink
from benchmarks.chaos.report import write
from benchmarks.local_postgres import why_not

from intentd.testbed import netns

pytestmark = pytest.mark.real

QUICK = ("kill", "stop", "break", "fins", "provider", "app", "job")
# A stop, a broken link beside the scheduler's death, the deaths of an application and a job's run,
# lost FINs; those of the seed that are soon over.
CHEAP = (3, 8, 9, 12, 20, 38)


def test_a_fault_is_the_same_drawn_alone() -> None:
    kinds = list(KINDS)
    whole = [draw(7, number, kinds) for number in range(200)]
    assert draw(7, 150, kinds) == whole[150]
    assert {fault.kind for fault in whole} == set(KINDS)
    assert draw(8, 150, kinds) != whole[150]
    assert [numbers(text, 3) for text in ("", "5", "5..7")] == [[0, 1, 2], [5], [5, 6, 7]]


def asked(prompt: str, *before: str) -> Asked:
    return Asked(prompt, before, 0.0)


@pytest.mark.parametrize(
    ("acked", "stored", "calls", "says"),
    [
        ([(1, "a"), (3, "b")], ["a", "x", "b"], [asked("a"), asked("b", "a", "x")], ""),
        ([(1, "a"), (2, "b")], ["b"], [asked("a"), asked("b", "a")], "not stored"),
        ([(1, "a"), (2, "b")], ["b", "a"], [asked("a"), asked("b", "a")], "another order"),
        ([(1, "a"), (1, "b")], ["a", "b"], [asked("a"), asked("b", "a")], "sequence numbers"),
        ([(1, "a")], ["a", "a"], [asked("a")], "stored twice"),
        ([(1, "a"), (2, "b")], ["a", "b"], [asked("a"), asked("b")], "without the turns"),
    ],
)
def test_the_judge_of_conversations(
    acked: list[tuple[int, str]], stored: list[str], calls: list[Asked], says: str
) -> None:
    found = judge(acked, stored, calls)
    assert says in found if says else not found


@pytest.mark.netns
@pytest.mark.skipif(bool(netns.unavailable()), reason=netns.unavailable() or "there are namespaces")
async def test_a_relayed_link_is_frozen_and_cut() -> None:
    with netns.Topology("ichaost") as net:
        space = net.namespace("relay")

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(100):
                writer.write(data)
            writer.close()

        sock = space.socket()
        sock.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(echo, sock=sock)
        link = TcpLink("a>b", space, "127.0.0.1", 0, sock.getsockname())
        await link.start()
        away = space.socket()
        away.setblocking(False)
        await asyncio.get_running_loop().sock_connect(away, (link.address, link.port))
        reader, writer = await asyncio.open_connection(sock=away)
        writer.write(b"1")
        assert await reader.read(10) == b"1"
        link.freeze()
        writer.write(b"2")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read(10)
        link.heal()
        assert await reader.read(10) == b"2"
        link.cut = True
        link.break_off()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        await link.close()
        server.close()


@pytest.mark.netns
@pytest.mark.timeout(400)  # seven daemons start; on a crowded machine that takes minutes
@pytest.mark.skipif(
    bool(netns.unavailable() or why_not()), reason=netns.unavailable() or why_not() or "all there"
)
async def test_a_few_faults_and_nothing_is_lost(tmp_path: Path) -> None:
    options = Options(
        3, CHEAP, QUICK, tmp_path / "logs", pause_s=0.1, warm_s=0.5, job_gpu_s=(0.5, 1.5)
    )
    report = await Campaign(options).run()
    write(report, tmp_path)
    assert report["violations"] == [], (tmp_path / "report.md").read_text()
    assert report["faults"] == len(CHEAP)
    assert report["load"]["flows"]["finished"] > 0
    assert report["load"]["jobs"]["accepted"] > 0
    assert report["load"]["prompts"]["turn"] > 0
