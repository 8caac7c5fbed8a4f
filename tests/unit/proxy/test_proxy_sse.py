"""Server-sent events: the same events however the bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import WireError
from intentd.proxy.adapter.sse import EventSplitter, encode_event, event_data

lines = st.binary(min_size=1).filter(lambda data: not set(data) & {10, 13})


@given(st.lists(lines, min_size=1), st.lists(st.integers(0, 200)), st.booleans())
def test_cuts_do_not_matter(data: list[bytes], cuts: list[int], crlf: bool) -> None:
    stream = b"".join(encode_event(item) for item in data)
    if crlf:
        stream = stream.replace(b"\n", b"\r\n")
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    splitter = EventSplitter(1 << 20)
    events = [
        event
        for start, end in itertools.pairwise(places)
        for event in splitter.feed(stream[start:end])
    ]
    assert [event_data(event) for event in events] == data
    assert not splitter.pending


def test_half_an_event_is_held_back() -> None:
    splitter = EventSplitter(100)
    assert splitter.feed(b"data: 1\n\ndata: 2") == [b"data: 1"]
    assert splitter.pending
    assert splitter.finish() == []
    assert splitter.feed(b"data: [DONE]") == []
    assert splitter.finish() == [b"data: [DONE]"]


def test_comments_and_several_lines() -> None:
    assert event_data(b": ping") is None
    assert event_data(b"event: x\ndata: a\ndata:b") == b"a\nb"


def test_an_event_is_bounded() -> None:
    with pytest.raises(WireError):
        EventSplitter(10).feed(b"x" * 11)
