"""SequencerCore: ids, repeats, leases, epochs, bounds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from intentd.core.flows.fin import Fin
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.ids import SPAN
from intentd.core.flows.turn.sequencer import SequencerCore, SequencerSettings
from intentd.core.flows.turn.wire import Run

DOMAIN = wire.name_id("link")
EPOCH = 9


def serving(**more: object) -> SequencerCore:
    core = SequencerCore(SequencerSettings(**more), epoch=EPOCH, previous=5, now=0.0)
    core.tick(1.0)
    return core


def ask(core: SequencerCore, name: str, message: wire.Message, now: float = 1.0) -> wire.Message:
    answer = core.receive(name.encode(), wire.encode(message), now)
    assert answer is not None
    return wire.decode(answer)


def hello(core: SequencerCore, name: str, **more: object) -> wire.Message:
    fields: dict[str, object] = {"boot": 1, "epoch": 0, "sequence": 1, "acked": 0, "held": ()}
    now = float(more.pop("now", 1.0))
    fields.update(more)
    return ask(core, name, wire.Hello("link", name, **fields), now)


def request(
    core: SequencerCore, name: str, number: int, count: int = 1, acked: int | None = None
) -> wire.Message:
    acked = number - 1 if acked is None else acked
    return ask(core, name, wire.TicketRequest(DOMAIN, EPOCH, 0, count, number, acked))


def state(core: SequencerCore, name: str, now: float = 1.0) -> wire.State:
    answer = ask(core, name, wire.Probe(DOMAIN, EPOCH, 0, 1), now)
    assert isinstance(answer, wire.State)
    return answer


def test_ids_grow_and_a_repeat_gets_the_same() -> None:
    core = serving()
    hello(core, "a")
    hello(core, "b")
    first = request(core, "a", 1, 8)
    assert first == wire.Tickets(DOMAIN, EPOCH, 0, 1, 8, 1, 0)
    assert request(core, "b", 1, 2) == wire.Tickets(DOMAIN, EPOCH, 0, 9, 2, 1, 0)
    assert request(core, "a", 1, 8) == first
    assert core.counts["repeated_requests"] == 1
    request(core, "a", 2)
    late = core.receive(b"a", wire.encode(wire.TicketRequest(DOMAIN, EPOCH, 0, 8, 1, 0)), 1.0)
    assert late is None
    assert core.counts["stale_requests"] == 1


def test_strangers_and_old_epochs_are_sent_to_register() -> None:
    core = serving()
    assert request(core, "a", 1) == wire.EpochChange(DOMAIN, EPOCH)
    hello(core, "a")
    old = wire.TicketRequest(DOMAIN, EPOCH - 1, 0, 1, 1, 0)
    assert ask(core, "a", old) == wire.EpochChange(DOMAIN, EPOCH)
    for message in (wire.Probe(DOMAIN, 3, 0, 1), wire.Heartbeat(DOMAIN, 3, 1, 0)):
        assert ask(core, "a", message) == wire.EpochChange(DOMAIN, EPOCH)


def restarted(core: SequencerCore) -> SequencerCore:
    """Left to the next process through a file."""
    return SequencerCore.resume(core.settings, json.loads(json.dumps(core.keep())))


def test_a_planned_restart_keeps_epoch_ids_answers_and_what_is_over() -> None:
    core = serving()
    for name in ("a", "b"):
        hello(core, name)
    first = request(core, "a", 1, 4)
    request(core, "b", 1, 2)
    core.finished(Fin(DOMAIN, EPOCH, wire.name_id("a"), 1, 1, (Run(0, 2, 1),)), 1.0)
    before = state(core, "b")
    again = restarted(core)
    assert not again.recovering
    assert request(again, "a", 1, 4) == wire.EpochChange(DOMAIN, EPOCH)  # a new connection
    held = (Run(0, 1, 1), Run(0, 3, 2))
    welcome = hello(again, "a", epoch=EPOCH, sequence=2, held=held)
    assert isinstance(welcome, wire.Welcome)
    assert (welcome.epoch, welcome.recover_ms, welcome.accepted) == (EPOCH, 0, held)
    hello(again, "b", epoch=EPOCH, sequence=2, held=(Run(0, 5, 2),))
    assert state(again, "b") == before
    assert request(again, "a", 1, 4) == first  # its answer may have been lost
    following = request(again, "a", 2)
    assert isinstance(following, wire.Tickets)
    assert following.first == 7
    assert restarted(again).keep() == again.keep()


def test_a_pause_is_a_lease_that_the_next_process_and_the_next_epoch_keep() -> None:
    core = serving()
    hello(core, "a", sequence=4)
    request(core, "a", 1, 2)
    ((peer, frame),) = core.pause(1.0, 5.0)
    assert (peer, wire.decode(frame)) == (b"a", wire.Pause(DOMAIN, EPOCH, 4, 5000))
    assert core.promised_until() == 6.0
    again = restarted(core)
    hello(again, "a", epoch=EPOCH, sequence=5, held=(Run(0, 1, 2),), now=1.5)
    again.tick(5.9)  # unheard for longer than a lease, and within what it was promised
    assert again.counts["expired_members"] == 0
    again.tick(6.1)
    assert again.counts["expired_members"] == 1
    crashed = SequencerCore(core.settings, epoch=20, previous=EPOCH, now=2.0, promised_until=6.0)
    crashed.tick(5.9)
    assert crashed.recovering  # a holder that is cut off may still count on its turns
    crashed.tick(6.0)
    assert not crashed.recovering


def test_a_promised_turn_that_another_process_took_over_stays_in_doubt() -> None:
    core = serving()
    hello(core, "a")
    request(core, "a", 1)
    core.pause(1.0, 5.0)
    again = restarted(core)
    hello(again, "b", now=1.5)
    hello(again, "a", boot=2, now=1.5)
    for now, over in ((5.9, 0), (6.1, 1)):
        hello(again, "b", sequence=int(now * 10), epoch=EPOCH, now=now - 0.1)
        again.tick(now)
        assert state(again, "b", now).floor == over


def test_turns_are_not_kept_while_collecting_nor_taken_up_with_other_settings() -> None:
    assert SequencerCore(SequencerSettings(), epoch=2, previous=1, now=0.0).keep() is None
    kept = serving().keep()
    assert kept is not None
    with pytest.raises(ValueError, match="settings: got others"):
        SequencerCore.resume(SequencerSettings(lease_s=0.5), kept)


def test_only_the_holder_finishes_an_id() -> None:
    core = serving()
    for name in ("a", "b"):
        hello(core, name)
    request(core, "a", 1, 3)
    for sender, boot, epoch in (("b", 1, EPOCH), ("a", 2, EPOCH), ("a", 1, EPOCH - 1)):
        core.finished(Fin(DOMAIN, epoch, wire.name_id(sender), boot, 1, (Run(0, 1, 3),)), 1.0)
        assert state(core, "b").floor == 0
    core.finished(Fin(DOMAIN, EPOCH, wire.name_id("a"), 1, 1, (Run(0, 2, 1),)), 1.0)
    assert (state(core, "b").floor, state(core, "b").finished) == (0, 0b10)
    core.receive(b"b", wire.encode(wire.Finished(DOMAIN, EPOCH, (Run(0, 1, 3),))), 1.0)
    assert state(core, "b").floor == 0
    core.receive(b"a", wire.encode(wire.Finished(DOMAIN, EPOCH, (Run(0, 1, 3),))), 1.0)
    assert state(core, "b").floor == 3


def test_a_heartbeat_says_what_is_over_but_not_of_answers_on_their_way() -> None:
    core = serving()
    hello(core, "a")
    request(core, "a", 1, 3)
    request(core, "a", 2, 2)
    beat = wire.Heartbeat(DOMAIN, EPOCH, 5, 1, (Run(0, 2, 1), Run(0, 3, 1, True)))
    assert ask(core, "a", beat) == wire.Beat(DOMAIN, EPOCH, 5)
    now = state(core, "a")
    assert (now.floor, now.finished, now.announced, now.issued) == (1, 0, 0b10, 5)
    ask(core, "a", wire.Heartbeat(DOMAIN, EPOCH, 4, 2, ()))  # overtaken: nothing
    assert state(core, "a").floor == 1
    ask(core, "a", wire.Heartbeat(DOMAIN, EPOCH, 6, 2, (Run(0, 5, 1),)))
    assert state(core, "a").floor == 4


def test_a_heartbeat_overtaken_by_a_request_is_too_old_to_judge_by() -> None:
    core = serving()
    hello(core, "a")
    request(core, "a", 1)
    request(core, "a", 2)  # acknowledges 1
    ask(core, "a", wire.Heartbeat(DOMAIN, EPOCH, 5, 0, ()))  # sent before that
    assert state(core, "a").floor == 0


def test_the_dead_are_declared_over_in_doubt_then_for_good() -> None:
    core = serving()
    hello(core, "a")
    request(core, "a", 1, 2)
    hello(core, "b", now=1.9)
    core.tick(2.05)
    now = state(core, "b", 2.05)
    assert (now.floor, now.lease) == (0, 0b11)
    core.tick(2.9)
    assert state(core, "b", 2.9).floor == 0
    core.tick(3.06)
    assert state(core, "b", 3.06).floor == 2
    assert request(core, "a", 2) == wire.EpochChange(DOMAIN, EPOCH)


def test_a_new_process_of_a_name_takes_over_and_the_old_one_does_not_come_back() -> None:
    core = serving()
    hello(core, "a")
    request(core, "a", 1)
    assert isinstance(hello(core, "a", boot=2), wire.Welcome)
    answer = hello(core, "a", boot=1, sequence=2)
    assert isinstance(answer, wire.Error)
    assert answer.code == wire.ERROR_SUPERSEDED
    assert state(core, "a").lease == 1


def test_held_ids_of_the_epoch_before_are_taken_up_while_recovering() -> None:
    core = SequencerCore(SequencerSettings(), epoch=EPOCH, previous=5, now=0.0)
    welcome = hello(core, "a", epoch=5, held=(Run(0, 7, 2), Run(0, 12, 1)), now=0.1)
    assert isinstance(welcome, wire.Welcome)
    assert welcome.accepted == (Run(0, 7, 2), Run(0, 12, 1))
    assert welcome.recover_ms == 901
    claim = hello(core, "b", epoch=5, held=(Run(0, 8, 1), Run(0, 9, 1)), now=0.1)
    assert isinstance(claim, wire.Welcome)
    assert claim.accepted == (Run(0, 9, 1),)
    stale = hello(core, "c", epoch=4, held=(Run(0, 10, 1),), now=0.1)
    assert isinstance(stale, wire.Welcome)
    assert stale.accepted == ()
    ticket = wire.TicketRequest(DOMAIN, EPOCH, 0, 1, 1, 0)
    assert core.receive(b"a", wire.encode(ticket), 0.2) is None
    core.tick(1.0)
    now = state(core, "a")
    assert (now.floor, now.finished, now.issued) == (6, 0b11000, 12)
    assert request(core, "c", 1) == wire.Tickets(DOMAIN, EPOCH, 0, 13, 1, 1, 6)


def test_bounds_are_kept() -> None:
    core = serving(max_members=3, max_domains=2, max_in_flight=4)
    for name in ("a", "b", "c"):
        assert isinstance(hello(core, name), wire.Welcome)
    refused = hello(core, "d")
    assert isinstance(refused, wire.Error)
    assert refused.code == wire.ERROR_LIMIT
    for number in range(1, 5):
        assert isinstance(request(core, "a", number, acked=0), wire.Tickets)
    busy = request(core, "a", 5, acked=0)
    assert isinstance(busy, wire.Error)
    assert busy.code == wire.ERROR_BUSY
    number = 0
    while isinstance(request(core, "b", number := number + 1, 4096), wire.Tickets):
        assert number < 20
    assert number * 4096 >= SPAN
    core.tick(9.0)
    core.tick(19.0)
    assert core.status()["sessions"] == 0
    assert core.status()["domains"] == {}


def test_a_forgotten_domain_does_not_repeat_ids() -> None:
    core = serving()
    hello(core, "a")
    last = request(core, "a", 1, 100)
    assert isinstance(last, wire.Tickets)
    core.tick(9.0)
    core.tick(19.0)
    assert core.status()["domains"] == {}
    hello(core, "a", boot=2, now=20.0)
    again = request(core, "a", 1)
    assert isinstance(again, wire.Tickets)
    assert again.first > last.first + 99


def test_served_domains_are_the_named_ones() -> None:
    core = serving(domains=("other",))
    refused = hello(core, "a")
    assert isinstance(refused, wire.Error)
    assert refused.code == wire.ERROR_DOMAIN


def test_a_connection_keeps_its_name() -> None:
    core = serving()
    hello(core, "a")
    refused = ask(core, "a", wire.Hello("link", "b", 7, 0, 1, 0))
    assert isinstance(refused, wire.Error)
    assert refused.code == wire.ERROR_NAME


def test_newer_versions_get_an_answer() -> None:
    core = serving()
    frame = bytearray(wire.encode(wire.Goodbye(DOMAIN, EPOCH)))
    frame[1] = 2
    answer = core.receive(b"a", bytes(frame), 1.0)
    assert answer is not None
    error = wire.decode(answer)
    assert isinstance(error, wire.Error)
    assert (error.code, core.counts["newer_version"]) == (wire.ERROR_VERSION, 1)


@pytest.mark.parametrize(
    "more", [{"recover_s": 0.5}, {"doubt_s": 0.5}], ids=["recover_s", "doubt_s"]
)
def test_settings_that_break_the_argument_are_refused(more: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="lease_s"):
        SequencerCore(SequencerSettings(**more), epoch=2, previous=1, now=0)
    with pytest.raises(ValueError, match="epoch"):
        SequencerCore(SequencerSettings(), epoch=1, previous=1, now=0)


@given(st.binary(max_size=120), st.binary(min_size=1, max_size=5))
def test_no_bytes_raise(frame: bytes, peer: bytes) -> None:
    core = serving(max_members=2)
    core.receive(peer, frame, 1.0)
    core.tick(2.0)


class Holders(RuleBasedStateMachine):
    """Against a naive model: id -> holder, and what is over."""

    def __init__(self) -> None:
        super().__init__()
        self.core = serving()
        self.names = ("a", "b", "c")
        self.numbers = dict.fromkeys(self.names, 0)
        self.sequences = dict.fromkeys(self.names, 1)
        self.held: dict[str, set[int]] = {name: set() for name in self.names}
        self.issued = 0
        for name in self.names:
            hello(self.core, name)

    names_st = st.sampled_from(("a", "b", "c"))

    @rule(name=names_st, count=st.integers(1, 5))
    def take(self, name: str, count: int) -> None:
        self.numbers[name] += 1
        got = request(self.core, name, self.numbers[name], count)
        assert isinstance(got, wire.Tickets)
        assert got.first == self.issued + 1
        self.issued += count
        self.held[name] |= set(range(got.first, got.first + count))

    @rule(name=names_st, first=st.integers(1, 40), count=st.integers(1, 6))
    def fin(self, name: str, first: int, count: int) -> None:
        run = Run(0, first, count)
        self.core.finished(Fin(DOMAIN, EPOCH, wire.name_id(name), 1, 1, (run,)), 1.0)
        self.held[name] -= set(range(first, first + count))

    @precondition(lambda self: any(self.held.values()))
    @rule(name=names_st, data=st.data())
    def beat(self, name: str, data: st.DataObject) -> None:
        ids = sorted(self.held[name])
        kept = {number for number in ids if data.draw(st.booleans())}
        self.sequences[name] += 1
        runs = tuple(Run(0, number, 1) for number in sorted(kept))
        message = wire.Heartbeat(DOMAIN, EPOCH, self.sequences[name], self.numbers[name], runs)
        assert isinstance(ask(self.core, name, message), wire.Beat)
        self.held[name] = kept

    @invariant()
    def the_state_is_what_nobody_holds(self) -> None:
        answer = state(self.core, "a")
        outstanding = set().union(*self.held.values())
        over = set(range(1, answer.floor + 1)) | {
            answer.floor + 1 + i
            for i in range(answer.finished.bit_length())
            if answer.finished >> i & 1
        }
        assert over == set(range(1, self.issued + 1)) - outstanding
        assert answer.issued == self.issued


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
