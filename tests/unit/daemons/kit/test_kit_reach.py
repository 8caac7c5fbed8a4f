"""Whether anybody listens: said at once, in a word."""

from __future__ import annotations

import socket

import pytest

from intentd.daemons.kit.reach import require_listener


def test_a_listener_and_an_address_of_another_form_pass() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        require_listener(f"127.0.0.1:{port}")
        require_listener(f"ray://127.0.0.1:{port}")
    require_listener("auto")


@pytest.mark.parametrize("address", ["127.0.0.1:{free}", "ray://[::1]:{free}", "127.0.0.1:70000"])
def test_nobody_there_is_one_word(address: str) -> None:
    with socket.socket() as bound:  # a port that nobody else takes meanwhile, and nobody hears
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError) as told:
            require_listener(address.format(free=bound.getsockname()[1]))
    assert "\n" not in str(told.value)
