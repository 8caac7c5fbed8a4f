"""Turn messages: byte-exact as documented, strict for everything else."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from benchmarks.fuzz import fuzz_fins, fuzz_frames
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import WireError
from intentd.core.flows import fin
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.wire import Run

ROOT = Path(__file__).parents[5]
DOMAIN = wire.name_id("uplink")

EXAMPLES: dict[str, wire.Message] = {
    "turn-hello": wire.Hello(
        "uplink",
        "host-a",
        0x0123456789ABCDEF,
        1700000000,
        9,
        4,
        (Run(0, 17, 2), Run(1, 5, 1, True)),
    ),
    "turn-request": wire.TicketRequest(DOMAIN, 1700000001, 2, 8, 5, 4),
    "turn-heartbeat": wire.Heartbeat(DOMAIN, 1700000001, 10, 5, (Run(2, 41, 8),)),
    "turn-probe": wire.Probe(DOMAIN, 1700000001, 2, 3),
    "turn-finished": wire.Finished(DOMAIN, 1700000001, (Run(2, 41, 8),)),
    "turn-goodbye": wire.Goodbye(DOMAIN, 1700000001),
    "turn-welcome": wire.Welcome(DOMAIN, 1700000001, 9, 1000, 160, 0, (Run(0, 17, 2),)),
    "turn-tickets": wire.Tickets(DOMAIN, 1700000001, 2, 41, 8, 5, 38),
    "turn-state": wire.State(DOMAIN, 1700000001, 2, 3, 38, 48, 0b10, 0b1, 0b100),
    "turn-beat": wire.Beat(DOMAIN, 1700000001, 10),
    "turn-epoch": wire.EpochChange(DOMAIN, 1700000001),
    "turn-pause": wire.Pause(DOMAIN, 1700000001, 10, 5000),
    "turn-error": wire.Error(DOMAIN, wire.ERROR_BUSY, 5, "too many ids outstanding"),
}


def documented(name: str) -> bytes:
    text = (ROOT / "docs" / "wire.md").read_text()
    match = re.search(rf"```hex {name}\n(.*?)```", text, re.DOTALL)
    assert match is not None, f"docs/wire.md has no example {name}"
    return bytes.fromhex(match[1])


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_documented_bytes_are_the_bytes(name: str) -> None:
    message = EXAMPLES[name]
    assert wire.encode(message).hex(" ") == documented(name).hex(" ")
    assert wire.decode(documented(name)) == message


def test_the_documented_fin_is_the_fin() -> None:
    signer = fin.FinSigner.from_domain_key(bytes(range(32)), "host-a", 0x0123456789ABCDEF)
    datagram = signer.sign(DOMAIN, 1700000001, (Run(2, 41, 8),))
    assert datagram.hex(" ") == documented("fin").hex(" ")


ids = st.integers(1, 2**40)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
classes = st.integers(0, 63)
names = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=60)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Run, ...]:
    out, last = [], (-1, 0)
    for _ in range(draw(st.integers(0, 6))):
        index = draw(st.integers(max(0, last[0]), 63))
        floor = last[1] + 1 if index == last[0] else 1
        first = draw(st.integers(floor, floor + 2**40))
        count = draw(st.integers(1, 65536))
        out.append(Run(index, first, count, draw(st.booleans())))
        last = (index, first + count - 1)
    return tuple(out)


@st.composite
def states(draw: st.DrawFn) -> wire.State:
    maps = [0, 0, 0]
    for bit in draw(st.sets(st.integers(0, 1023), max_size=20)):
        maps[draw(st.integers(0, 2))] |= 1 << bit
    floor = draw(ids)
    return wire.State(draw(u64), draw(u64), draw(classes), draw(u32), floor, floor + 1024, *maps)


messages = st.one_of(
    st.builds(wire.Hello, names, names, u64, u64, u32, u32, runs()),
    st.builds(wire.TicketRequest, u64, u64, classes, st.integers(1, 4096), u32, u32),
    st.builds(wire.Heartbeat, u64, u64, u32, u32, runs()),
    st.builds(wire.Probe, u64, u64, classes, u32),
    st.builds(wire.Finished, u64, u64, runs()),
    st.builds(wire.Goodbye, u64, u64),
    st.builds(wire.Welcome, u64, u64, u32, st.just(1000), st.integers(1, 999), u32, runs()),
    st.builds(wire.Tickets, u64, u64, classes, ids, st.integers(1, 4096), u32, st.integers(0, 9)),
    states(),
    st.builds(wire.Beat, u64, u64, u32),
    st.builds(wire.Pause, u64, u64, u32, u32),
    st.builds(wire.EpochChange, u64, u64),
    st.builds(wire.Error, u64, st.sampled_from(wire.ERROR_CODES), u32, names),
)


@given(messages)
def test_what_is_encoded_decodes_to_the_same(message: wire.Message) -> None:
    frame = wire.encode(message)
    assert wire.decode(frame) == message
    for other in (frame[:-1], frame + b"\0"):
        with pytest.raises(WireError):
            wire.decode(other)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(frame: bytes) -> None:
    try:
        message = wire.decode(frame)
    except WireError:
        return
    assert wire.encode(message) == frame


@given(messages, st.data())
def test_a_changed_byte_is_another_message_or_none(
    message: wire.Message, data: st.DataObject
) -> None:
    frame = bytearray(wire.encode(message))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        other = wire.decode(bytes(frame))
    except WireError:
        return
    assert other != message
    assert wire.encode(other) == bytes(frame)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"", "type and version"),
        (bytes((99, 1)), "known type"),
        (bytes((wire.PROBE, 2)) + bytes(21), "newer than 1"),
        (bytes(wire.MAX_FRAME_BYTES + 1), "at most"),
        (wire.encode(wire.Probe(1, 1, 63, 1)).replace(b"\x3f", b"\x40", 1), "class"),
        (
            wire.encode(wire.TicketRequest(1, 1, 0, 4096, 1, 0)).replace(b"\x10", b"\x11", 1),
            "count",
        ),
    ],
)
def test_refusals_name_the_field(frame: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        wire.decode(frame)


def test_runs_must_ascend() -> None:
    for held in ((Run(1, 5, 2), Run(1, 6, 1)), (Run(2, 1, 1), Run(1, 9, 1))):
        with pytest.raises(WireError, match="ascending"):
            wire.decode(wire.encode(wire.Finished(1, 1, held)))


def test_newer_versions_are_told_apart_from_garbage() -> None:
    frame = bytearray(wire.encode(wire.Goodbye(1, 1)))
    frame[1] = 7
    assert wire.is_newer(bytes(frame))
    assert not wire.is_newer(b"\xff\x07")


def test_hostile_datagrams_and_frames_are_dropped_and_counted() -> None:
    """A short run of ``python -m benchmarks.fuzz``."""
    fins = fuzz_fins(4000, random.Random(3))
    assert fins["accepted"] == 0
    assert fins["counted"]
    assert fins["honest_accepted"] == fins["honest_sent"]
    frames = fuzz_frames(4000, random.Random(4))
    assert frames["released"] == 0
    assert frames["members"] <= 16
    assert frames["domains"] <= 4
