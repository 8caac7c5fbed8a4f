"""FIN datagrams: nothing forged, replayed or malformed gets through, and memory is bounded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intentd.core.errors import WireError
from intentd.core.flows import fin
from intentd.core.flows.fin import FinSigner, FinVerifier
from intentd.core.flows.turn.wire import Run

KEY = bytes(range(32))
RUNS = (Run(2, 41, 8),)


def signer(name: str = "a", boot: int = 1, key: bytes = KEY) -> FinSigner:
    return FinSigner.from_domain_key(key, name, boot)


def test_a_signed_fin_passes_once() -> None:
    verifier = FinVerifier(KEY)
    datagram = signer().sign(7, 9, RUNS)
    accepted = verifier.accept(datagram)
    assert accepted is not None
    assert (accepted.domain_id, accepted.epoch, accepted.boot, accepted.runs) == (7, 9, 1, RUNS)
    assert verifier.accept(datagram) is None
    assert verifier.dropped == {"malformed": 0, "forged": 0, "replayed": 1, "late": 0}


def test_another_key_is_forged() -> None:
    verifier = FinVerifier(KEY)
    assert verifier.accept(signer(key=bytes(32)).sign(7, 9, RUNS)) is None
    assert verifier.dropped["forged"] == 1
    assert len(verifier) == 0


def test_one_senders_key_does_not_speak_for_another() -> None:
    """Whoever holds only its own derived key cannot sign in another's name."""
    thief = FinSigner(fin.sender_key(KEY, signer("thief").sender), "thief", 1)
    thief.sender = signer("victim").sender
    verifier = FinVerifier(KEY)
    assert verifier.accept(thief.sign(7, 9, RUNS)) is None
    assert verifier.dropped["forged"] == 1


@given(st.data())
def test_any_changed_bit_is_refused(data: st.DataObject) -> None:
    datagram = bytearray(signer().sign(7, 9, RUNS))
    at = data.draw(st.integers(0, len(datagram) * 8 - 1))
    datagram[at // 8] ^= 1 << at % 8
    assert FinVerifier(KEY).accept(bytes(datagram)) is None


@given(st.binary(max_size=fin.MAX_BYTES + 4))
def test_no_bytes_crash_the_decoder(datagram: bytes) -> None:
    verifier = FinVerifier(KEY)
    assert verifier.accept(datagram) is None
    assert sum(verifier.dropped.values()) == 1
    with pytest.raises(WireError):
        fin.decode(b"2F" + datagram[:20])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), max_size=200), st.integers(0, 3))
def test_the_window_lets_each_counter_through_once(order: list[int], gap: int) -> None:
    sign = signer()
    datagrams = [sign.sign(7, 9, RUNS) for _ in range(41 * (gap + 1))][:: gap + 1]
    verifier, seen = FinVerifier(KEY), set()
    for index in order:
        accepted = verifier.accept(datagrams[index])
        assert (accepted is not None) == (index not in seen)
        seen.add(index)


def test_what_is_older_than_the_window_is_late() -> None:
    sign = signer()
    datagrams = [sign.sign(7, 9, RUNS) for _ in range(fin.WINDOW + 2)]
    verifier = FinVerifier(KEY)
    assert verifier.accept(datagrams[-1]) is not None
    assert verifier.accept(datagrams[0]) is None
    assert verifier.accept(datagrams[2]) is not None
    assert verifier.dropped["late"] == 1


def test_a_restarted_sender_counts_anew_and_the_old_one_does_not_come_back() -> None:
    verifier = FinVerifier(KEY)
    old = signer(boot=1).sign(7, 9, RUNS)
    assert verifier.accept(old) is not None
    assert verifier.accept(signer(boot=2).sign(7, 9, RUNS)) is not None
    assert verifier.accept(old) is None


def test_senders_are_bounded() -> None:
    verifier = FinVerifier(KEY, max_senders=10)
    for number in range(50):
        assert verifier.accept(signer(f"agent-{number}").sign(7, 9, RUNS)) is not None
        verifier.accept(random.Random(number).randbytes(72))
    assert len(verifier) == 10


@pytest.mark.parametrize("runs", [(), tuple(Run(0, i + 1, 1) for i in range(65))])
def test_the_signer_refuses_what_does_not_fit(runs: tuple[Run, ...]) -> None:
    with pytest.raises(ValueError, match="runs"):
        signer().sign(7, 9, runs)


def test_keys_have_a_length() -> None:
    with pytest.raises(ValueError, match="expected 32"):
        FinVerifier(b"short")
    with pytest.raises(ValueError, match="expected 32"):
        FinSigner(b"short", "a", 1)
