"""The application protocol: round trips, the documented bytes, one clear error for each defect."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.agent import app_protocol as wire
from intentd.agent import client
from intentd.core.errors import WireError

ROOT = Path(__file__).parents[3]

requests = st.integers(0, 2**32 - 1)
sizes = st.integers(0, wire.MAX_SIZE_BYTES)
names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=16)
u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
peers = st.one_of(st.just(""), st.ip_addresses().map(str))
opens = st.builds(
    wire.Open,
    requests,
    sizes,
    names,
    peers,
    u16,
    st.sampled_from([0, wire.WANTS_MARK, wire.WANTS_MARK | wire.MARK_ONLY]),
)

EXAMPLES = {
    "app-hello": wire.encode_hello(0, "fileserver"),
    "app-welcome": wire.encode_welcome(0, 0x0123456789ABCDEF, 3, 16384),
    "app-open": wire.encode_open(wire.Open(7, 1_000_000, "uplink", "10.0.0.2")),
    "app-open-ipv6-mark": wire.encode_open(wire.Open(8, 1500, "", "fd00::2", 1, wire.WANTS_MARK)),
    "app-grant": wire.encode_grant(
        wire.Grant(7, 42, 2, 10, "", wire.GRANT_SHAPED, 0x2D170012, 65536, 10**9)
    ),
    "app-queued": wire.encode_queued(wire.Queued(7, 42, 2, 3, 30001)),
    "app-announce": wire.encode_announce(7, 65536),
    "app-done": wire.encode_done(7, 1_000_000, 5_000_000_000, 5_008_000_000),
    "app-cancel": wire.encode_cancel(7),
    "app-mark": wire.encode_mark(7),
    "app-marked": wire.encode_marked(wire.Marked(7, 2, 10, 0x2D170012)),
    "app-error": wire.encode_error(
        7,
        wire.E_VALUE,
        "OPEN.size_bytes: got -1, expected bytes from 0 to 2**62 (every flow states its size)",
    ),
    "app-stats": wire.encode_stats(9, "uplink"),
    "app-pause": wire.encode_pause(20_000),
    "app-stats-reply": wire.encode_stats_reply(wire.StatsReply(9, 100, 98, 1, 1, 1, 2, 6)),
}


def test_the_documented_bytes_are_the_bytes() -> None:
    text = (ROOT / "docs" / "wire.md").read_text()
    blocks = dict(re.findall(r"```hex (app-[a-z0-9-]+)\n(.*?)```", text, re.DOTALL))
    assert {name: bytes.fromhex(hexes) for name, hexes in blocks.items()} == EXAMPLES


@given(opens)
def test_open_round_trip(message: wire.Open) -> None:
    packet = wire.encode_open(message)
    assert len(packet) <= wire.MAX_PACKET
    assert wire.decode_request(packet) == message


@given(requests, names, sizes, u64, u64)
def test_other_requests_round_trip(request: int, name: str, size: int, a: int, b: int) -> None:
    for packet, message in (
        (wire.encode_hello(request, name), wire.Hello(request, name)),
        (wire.encode_announce(request, size), wire.Announce(request, size)),
        (wire.encode_done(request, size, a, b), wire.Done(request, size, a, b)),
        (wire.encode_cancel(request), wire.Cancel(request)),
        (wire.encode_mark(request), wire.Mark(request)),
        (wire.encode_stats(request, name), wire.Stats(request, name)),
    ):
        assert wire.decode_request(packet) == message


@given(requests, u64, u16, st.integers(0, 255), st.sampled_from(wire.REASONS), u32, st.text())
def test_replies_round_trip(
    request: int, flow: int, index: int, dscp: int, reason: str, number: int, text: str
) -> None:
    grant = wire.Grant(request, flow, index, dscp, reason, 3, number, number, flow)
    queued = wire.Queued(request, flow, index, number, number)
    marked = wire.Marked(request, index, dscp, number)
    stats = wire.StatsReply(request, flow, flow, flow, number, number, number, number)
    welcome = wire.Welcome(request, flow, number, number)
    assert wire.decode_reply(wire.encode_grant(grant)) == grant
    assert wire.decode_reply(wire.encode_queued(queued)) == queued
    assert wire.decode_reply(wire.encode_marked(marked)) == marked
    assert wire.decode_reply(wire.encode_stats_reply(stats)) == stats
    assert wire.decode_reply(wire.encode_welcome(request, flow, number, number)) == welcome
    error = wire.decode_reply(wire.encode_error(request, 3, text))
    assert isinstance(error, wire.Error)
    assert error.request == request
    assert text.encode("utf-8", "replace").decode().startswith(error.text)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoders(packet: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        with contextlib.suppress(WireError):
            decode(packet)


@given(opens, st.integers(0, 103), st.integers(0, 255))
def test_a_changed_byte_is_another_message_or_an_error(
    message: wire.Open, offset: int, value: int
) -> None:
    packet = bytearray(wire.encode_open(message))
    packet[offset] = value
    refusal = None
    try:
        wire.decode_request(bytes(packet))
    except wire.ProtocolError as error:
        refusal = error
    if refusal is not None:
        reply = wire.decode_reply(refusal.packet())
        assert isinstance(reply, wire.Error)
        assert reply.text == str(refusal)[: wire.MAX_TEXT]


def changed(offset: int, raw: bytes) -> bytes:
    packet = bytearray(wire.encode_open(wire.Open(7, 100, "uplink", "10.0.0.2")))
    packet[offset : offset + len(raw)] = raw
    return bytes(packet)


@pytest.mark.parametrize(
    ("packet", "code", "text"),
    [
        (b"", wire.E_MALFORMED, "packet length: got 0, expected at least 8 bytes (the header)"),
        (changed(0, b"XY"), wire.E_MALFORMED, "magic: got '0x5859', expected 0x4941"),
        (changed(2, b"\2"), wire.E_VERSION, "version: got 2, expected 1"),
        (changed(3, b"\4"), wire.E_MALFORMED, "type: got 'GRANT', expected HELLO, OPEN"),
        (changed(3, b"\xff"), wire.E_MALFORMED, "type: got 255, expected HELLO, OPEN"),
        (changed(0, b"") + b"x", wire.E_MALFORMED, "OPEN packet length: got 105, expected 104"),
        (changed(8, b"\0\x08"), wire.E_VALUE, "OPEN.flags: got 8, expected bits 0 to 2 only"),
        (changed(8, b"\0\2"), wire.E_VALUE, "OPEN.flags: got 2, expected bit 1 only with bit 0"),
        (changed(12, b"\5"), wire.E_VALUE, "OPEN.family: got 5, expected 0 (no peer), 4 or 6"),
        (changed(12, b"\0"), wire.E_VALUE, "OPEN.peer: got"),
        (changed(13, b"\1"), wire.E_VALUE, "OPEN.reserved: got"),
        (changed(16, b"\xff" * 8), wire.E_VALUE, "OPEN.size_bytes: got -1, expected bytes from 0"),
        (changed(30, b"\1"), wire.E_VALUE, "OPEN.peer: got"),
        (changed(40, b"\xff"), wire.E_VALUE, "OPEN.domain: got b'\\xffplink', expected UTF-8"),
        (changed(40, b"\x07"), wire.E_VALUE, "OPEN.domain: got '\\x07plink', expected printable"),
        (changed(40, b"\0"), wire.E_VALUE, "OPEN.domain: got"),
        (wire.encode_done(1, 2**63), wire.E_VALUE, "DONE.bytes_sent: got 9223372036854775808"),
        (wire.encode_announce(1, 2**63), wire.E_VALUE, "ANNOUNCE.bytes_left: got"),
    ],
)
def test_defects_are_named(packet: bytes, code: int, text: str) -> None:
    with pytest.raises(wire.ProtocolError) as caught:
        wire.decode_request(packet)
    assert str(caught.value).startswith(text)
    assert caught.value.code == code


def test_an_error_fits_its_packet_and_cuts_no_character() -> None:
    packet = wire.encode_error(1, wire.E_VALUE, "ü" * 1000)
    assert len(packet) <= wire.MAX_PACKET
    reply = wire.decode_reply(packet)
    assert isinstance(reply, wire.Error)
    assert reply.text == "ü" * (wire.MAX_TEXT // 2)


def test_the_client_module_speaks_the_same_bytes() -> None:
    """It is one file that imports nothing of ours, so it repeats the formats."""
    for name in ("MAGIC", "VERSION", "NO_CLASS", "REASONS", "WANTS_MARK", "MARK_ONLY"):
        assert getattr(client, f"_{name}") == getattr(wire, name)
    for name in ("HELLO", "WELCOME", "OPEN", "GRANT", "QUEUED", "ANNOUNCE", "DONE", "CANCEL"):
        assert getattr(client, f"_{name}") == getattr(wire, name)
    for name in ("MARK", "MARKED", "ERROR"):
        assert getattr(client, f"_{name}") == getattr(wire, name)
    assert client._STOPPING == wire.E_STOPPING
    opened = client._open_packet(7, 100, "uplink", ("fd00::2", 80), 3, wire.WANTS_MARK)
    assert wire.decode_request(opened) == wire.Open(7, 100, "uplink", "fd00::2", 3, 1)
    assert client._HELLO_PACKET.size == len(EXAMPLES["app-hello"])
    assert client._GRANT_PACKET.size == len(EXAMPLES["app-grant"])
    assert client._QUEUED_PACKET.size == len(EXAMPLES["app-queued"])
    assert client._ANNOUNCE_PACKET.size == len(EXAMPLES["app-announce"])
    assert client._DONE_PACKET.size == len(EXAMPLES["app-done"])
    assert client._MARKED_PACKET.size == len(EXAMPLES["app-marked"])
