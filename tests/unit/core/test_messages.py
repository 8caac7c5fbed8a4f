from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core import messages
from intentd.core.errors import WireError

HELLO = messages.Hello(
    role="agent",
    host="h1",
    name="agent",
    version="0.1.0",
    boot="00ff",
    policies={"flows": [1, 7]},
    capabilities={"shapes": True},
)
EVERY = [
    HELLO,
    messages.Report(boot="00ff", sequence=3, body={"flows": {}}),
    messages.NumberedPolicy("flows", 1, 7, 1.5, {"domains": []}),
    messages.PolicyAck("flows", 1, 7, False, "no such device"),
    messages.Welcome("c1", "ab", 2.0),
    messages.Refusal("newer"),
    messages.Goodbye("00ff"),
]


@pytest.mark.parametrize("message", EVERY, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_round_trip(message: messages.Message) -> None:
    assert messages.from_plain(messages.to_plain(message)) == message


def changed(**fields: Any) -> list[Any]:
    name, version, body = messages.to_plain(HELLO)
    return [name, version, {**body, **fields}]


@pytest.mark.parametrize(
    ("plain", "names"),
    [
        (None, "message"),
        (["hello", 1], "message"),
        (["helo", 1, {}], "message type"),
        (["hello", 2, {}], "newer"),
        (["hello", True, {}], "message version"),
        (["hello", 1, []], "map of fields"),
        (["hello", 1, {}], "hello.role"),
        (changed(colour="red"), "hello.colour"),
        (changed(role="printer"), "hello.role"),
        (changed(host=7), "hello.host"),
        (changed(host="x" * 5000), "hello.host"),
        (changed(policies={"flows": [1]}), "hello.policies"),
        (changed(policies={"flows": [1, -1]}), "hello.policies"),
        (changed(policies={"cats": [1, 1]}), "hello.policies"),
        (changed(capabilities={1: 2}), "hello.capabilities"),
        (["ack", 1, {"application": "flows", "era": 0, "number": -1, "applied": True}], "ack"),
        (
            ["welcome", 1, {"controller": "c", "boot": "b", "report_interval_s": float("nan")}],
            "report_interval_s",
        ),
    ],
)
def test_a_bad_message_is_refused_by_name(plain: object, names: str) -> None:
    with pytest.raises(WireError, match=names):
        messages.from_plain(plain)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(
    st.tuples(
        st.sampled_from(["hello", "report", "policy", "ack", "welcome", "refusal", "goodbye"]),
        st.integers(0, 3),
        st.dictionaries(
            st.sampled_from(["boot", "host", "role", "body", "era", "policies", "x"]), plain_values
        ),
    )
    | plain_values
)
def test_no_value_breaks_the_decoder(plain: object) -> None:
    try:
        message = messages.from_plain(plain)
    except WireError:
        return
    assert messages.from_plain(messages.to_plain(message)) == message
