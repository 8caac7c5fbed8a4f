"""The control link: joining, policies, kept policies, hubs that come and go, any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar

import msgpack
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError, IntentdError, PolicyError, WireError
from intentd.core.messages import (
    Hello,
    Message,
    NumberedPolicy,
    PolicyAck,
    Refusal,
    Report,
    Welcome,
    to_plain,
)
from intentd.daemons.kit import keys
from intentd.daemons.kit.codec import decode, encode
from intentd.daemons.kit.config import (
    ControllerSection,
    DaemonConfig,
    HubSection,
    InvalidConfigError,
    validate,
)
from intentd.daemons.kit.hub import HubLink, Member, NoAnswerError
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.daemons.kit.link import MemberLink
from intentd.daemons.kit.zmqfd import ZmqStream

INTERVAL_S = 0.05
LIMIT_S = 30.0


class AgentConfig(DaemonConfig):
    """A member for tests."""

    role: ClassVar[str] = "agent"


class Story:
    """Remembers what callbacks saw, and lets a test wait for it."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._grew = asyncio.Condition()
        self._news = asyncio.Event()

    def note(self, *event: Any) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                self._news.clear()
                if holds():
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await self._news.wait()

    def count(self, name: str) -> int:
        return sum(event[0] == name for event in self.events)


class Rig:
    """Hubs and members in one loop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tasks = Tasks()
        self.story = Story()
        self.links: list[MemberLink | HubLink] = []
        self.refuse = ""

    async def hub(self, bind: str = "tcp://127.0.0.1:0", **section: Any) -> HubLink:
        story = self.story
        hub = HubLink(
            HubSection(bind=bind, report_interval_s=INTERVAL_S, **section),
            Kit("controller"),
            name="c",
            on_hello=lambda member: story.note("hello", member.name),
            on_report=lambda member, report: story.note("report", member.name, report),
            on_ack=lambda member, ack: story.note("ack", member.name, ack),
            on_goodbye=lambda member, reason: story.note("goodbye", member.name, reason),
        )
        await hub.start(self.tasks)
        self.links.append(hub)
        return hub

    async def member(
        self, endpoint: str, name: str = "a", on_question: Any = None, **section: Any
    ) -> MemberLink:
        config = AgentConfig(
            name=name,
            state_dir=self.directory,
            controller=ControllerSection(
                endpoint=endpoint, backoff_min_s=0.01, backoff_max_s=0.2, **section
            ),
        )

        def on_policy(policy: NumberedPolicy) -> PolicyAck:
            if self.refuse:
                raise PolicyError("classes[0].weight", 2, self.refuse)
            self.story.note("applied", name, policy.number)
            return PolicyAck(policy.application, policy.era, policy.number, True)

        link = MemberLink(
            config, Kit("agent"), on_policy=on_policy, collect_report=lambda: {"flows": {"x": 1}},
            on_question=on_question,
        )  # fmt: skip
        await link.start(self.tasks)
        self.links.append(link)
        return link

    async def close(self, link: MemberLink | HubLink) -> None:
        self.links.remove(link)
        await link.stop()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    async with made.tasks:
        yield made
        for link in reversed(made.links):
            await link.stop()
        made.tasks.cancel_all()


def policy(number: int, era: int = 1, **body: Any) -> NumberedPolicy:
    return NumberedPolicy("flows", era, number, 0.0, body)


async def test_a_member_joins_reports_and_runs_the_newest_policy(rig: Rig) -> None:
    hub = await rig.hub()
    hub.publish(policy(1))
    link = await rig.member(hub.endpoint)
    await rig.story.until(lambda: rig.story.count("ack") == 1)
    hub.publish(policy(2))
    await rig.story.until(lambda: hub.members()[0].policies == {"flows": [1, 2]})
    assert [e[2] for e in rig.story.events if e[0] == "applied"] == [1, 2]
    assert link.policies() == {"flows": [1, 2]}
    await rig.story.until(lambda: rig.story.count("report") >= 2)
    assert next(e[2] for e in rig.story.events if e[0] == "report").body == {"flows": {"x": 1}}
    assert hub.members("agent")[0].policies == {"flows": [1, 2]}
    assert hub.members("gpu") == []
    assert link.summary()["connected"]
    assert hub.summary()["members"] == 1
    with pytest.raises(InputError, match="more than"):
        hub.publish(policy(2))
    await rig.close(link)
    await rig.story.until(lambda: ("goodbye", "a", "goodbye") in rig.story.events)
    assert not hub.members()[0].connected


async def test_a_member_that_is_not_ready_says_why(rig: Rig) -> None:
    hub = await rig.hub()
    link = await rig.member(hub.endpoint)
    await rig.story.until(lambda: rig.story.count("report") >= 1)
    assert hub.members()[0].unready == []
    link._kit.unready = lambda: ["disk full"]
    await rig.story.until(lambda: hub.members()[0].to_plain(0)["unready"] == ["disk full"])
    link._kit.unready = list
    await rig.story.until(lambda: hub.members()[0].unready == [])


async def test_a_refused_policy_shows_its_reason_and_is_not_repeated(rig: Rig) -> None:
    hub = await rig.hub()
    link = await rig.member(hub.endpoint)
    hub.publish(policy(1))
    await rig.story.until(lambda: link.connected and link.policies() == {"flows": [1, 1]})
    rig.refuse = "a share in (0, 1]"
    hub.publish(policy(2))
    await rig.story.until(lambda: bool(hub.members()[0].to_plain(0)["refused"]))
    refused = hub.members()[0].to_plain(0)["refused"]["flows"]
    assert refused == {
        "policy": [1, 2],
        "reason": "classes[0].weight: got 2, expected a share in (0, 1]",
    }
    assert link.policies() == {"flows": [1, 1]}
    reports = rig.story.count("report")
    await rig.story.until(lambda: rig.story.count("report") >= reports + 3)
    assert sum(e[0] == "ack" and not e[2].applied for e in rig.story.events) == 1
    rig.refuse = ""
    hub.publish(policy(3))
    await rig.story.until(lambda: link.policies() == {"flows": [1, 3]})


async def test_a_policy_that_meets_a_defect_is_refused_not_fatal(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the kept policy would crash the member at every start."""
    hub = await rig.hub()
    link = await rig.member(hub.endpoint)

    def defect(_: NumberedPolicy) -> PolicyAck:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(link, "_on_policy", defect)
    hub.publish(policy(1))
    await rig.story.until(lambda: bool(hub.members()) and bool(hub.members()[0].acks))
    assert hub.members()[0].acks["flows"].reason == "internal error: ZeroDivisionError: a defect"
    assert link.policies() == {}


async def test_the_last_policy_outlives_the_member(rig: Rig) -> None:
    hub = await rig.hub()
    link = await rig.member(hub.endpoint)
    hub.publish(policy(5, body="x"))
    await rig.story.until(lambda: link.policies() == {"flows": [1, 5]})
    await rig.close(link)
    await rig.close(hub)
    alone = await rig.member("tcp://127.0.0.1:9")
    assert alone.policies() == {"flows": [1, 5]}
    assert alone.applied("flows") == policy(5, body="x")
    assert not alone.connected


@pytest.mark.parametrize("content", [b"", b"\xc1", encode(Refusal("x")), b"\xff" * 5_000_000])
async def test_a_damaged_kept_policy_is_ignored(rig: Rig, content: bytes) -> None:
    (rig.directory / "agent-policy-flows.msgpack").write_bytes(content)
    assert (await rig.member("tcp://127.0.0.1:9")).policies() == {}


async def test_a_full_disk_is_told_and_repaired(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = await rig.hub()
    link = await rig.member(hub.endpoint)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("intentd.daemons.kit.link.write_atomically", full)
        hub.publish(policy(1))
        await rig.story.until(lambda: link.policies() == {"flows": [1, 1]})
        assert link.unready() == ["policy not kept on disk: No space left on device"]
    await rig.story.until(lambda: link.unready() == [])
    assert (rig.directory / "agent-policy-flows.msgpack").exists()


async def test_a_restarted_hub_finds_its_members_again(rig: Rig) -> None:
    hub = await rig.hub()
    endpoint = hub.endpoint
    hub.publish(policy(3))
    link = await rig.member(endpoint)
    await rig.story.until(lambda: link.policies() == {"flows": [1, 3]})
    await rig.close(hub)
    await rig.story.until(lambda: not link.connected)
    assert link.policies() == {"flows": [1, 3]}
    hub = await rig.hub(endpoint)
    await rig.story.until(lambda: link.connected)
    assert hub.highest_seen == {"flows": (1, 3)}
    hub.publish(policy(1, era=1))  # older than what the member runs: it keeps its own
    hub.publish(policy(1, era=2))
    await rig.story.until(lambda: link.policies() == {"flows": [2, 1]})


async def test_questions_are_answered_refused_bounded_and_late(rig: Rig) -> None:
    hub = await rig.hub()
    gate = asyncio.Event()

    async def on_question(subject: str, body: dict[str, Any]) -> dict[str, Any]:
        if subject == "wait":
            await gate.wait()
        if subject == "bad":
            raise InputError("body", body, "something else")
        if subject == "defect":
            raise RuntimeError("secret")
        if subject == "large":
            return {"x": b"x" * (5 << 20)}
        return {"said": [subject, body]}

    await rig.member(hub.endpoint, "a", on_question=on_question)
    await rig.member(hub.endpoint, "old")
    await rig.story.until(lambda: rig.story.count("hello") == 2)
    key = ("agent", "a")
    assert await hub.ask(key, "echo", {"x": 1}) == {"said": ["echo", {"x": 1}]}
    for subject, said in (
        ("bad", "agent/a: body: got"),
        ("defect", "agent/a: internal error: RuntimeError$"),
        ("large", "agent/a: message: .* bytes, expected at most"),
    ):
        with pytest.raises(NoAnswerError, match=said):
            await hub.ask(key, subject)
    with pytest.raises(NoAnswerError, match=r"agent/old: version .* answers no questions"):
        await hub.ask(("agent", "old"), "echo")
    with pytest.raises(NoAnswerError, match="agent/none: not connected"):
        await hub.ask(("agent", "none"), "echo")
    with pytest.raises(NoAnswerError, match=r"no answer within 0\.05 s"):
        await hub.ask(key, "wait", timeout_s=0.05)
    waiting = [asyncio.create_task(hub.ask(key, "wait", {"n": n})) for n in range(12)]
    refused = [error async for error in _busy(waiting, 5)]
    assert all("busy with 8 questions" in text for text in refused)
    gate.set()
    answers = [await task for task in waiting if not task.done() or not task.exception()]
    assert len(answers) == 7, "the one that came too late still counted as one of eight"
    assert await hub.ask(key, "echo") == {"said": ["echo", {}]}


async def _busy(tasks: list[asyncio.Task[Any]], count: int) -> AsyncIterator[str]:
    """What the first tasks that end raised."""
    pending = set(tasks)
    while count:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            count -= 1
            yield str(task.exception())


async def test_a_silent_member_expires_and_a_namesake_replaces(rig: Rig) -> None:
    hub = await rig.hub(expiry_intervals=2)
    first = await rig.member(hub.endpoint)
    await rig.story.until(lambda: first.connected)
    second = await rig.member(hub.endpoint)
    await rig.story.until(lambda: ("goodbye", "a", "replaced") in rig.story.events)
    assert len(hub.members()) == 1
    await rig.close(first)
    await rig.story.until(lambda: second.connected)
    assert second._joined is not None
    second._joined.stop()  # as if the host had lost power
    await rig.story.until(lambda: ("goodbye", "a", "silent") in rig.story.events)


async def test_of_two_controllers_the_member_follows_the_one_that_answers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intentd.daemons.kit.link.ANSWER_S", 0.1)
    monkeypatch.setattr("intentd.daemons.kit.link.GREET_AGAIN_S", 0.2)
    here, there = (f"ipc://{rig.directory}/{name}" for name in ("one", "two"))
    one = await rig.hub(here)
    one.publish(policy(1))
    link = await rig.member(f"{here},{there}")
    await rig.story.until(lambda: link.policies() == {"flows": [1, 1]})
    assert link.summary()["endpoint"] == here
    await rig.close(one)  # its connection ends: the other may lead now
    two = await rig.hub(there)
    two.publish(policy(2))
    await rig.story.until(lambda: link.policies() == {"flows": [1, 2]})
    assert link.summary()["endpoint"] == there
    one = await rig.hub(here)
    one.publish(policy(3))
    monkeypatch.setattr(two, "_leads", lambda: False)  # stays connected and says nothing
    await rig.story.until(lambda: link.policies() == {"flows": [1, 3]})
    assert link.summary()["endpoint"] == here
    assert list(link._lines) == [here], "the other line is not kept"


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("tcp://a:1,udp://b:2", "controller.endpoint: got 'udp://b:2', expected tcp://HOST:PORT"),
        ("tcp://a:1, ", "controller.endpoint: got '', expected tcp://HOST:PORT"),
        (["tcp://a:1", "tcp://a:1"], "at most 8 addresses, each once"),
        (["tcp://a:1", 7], "expected a valid string"),
    ],
)
def test_wrong_endpoints_are_refused(endpoint: Any, says: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        validate(AgentConfig, {"controller": {"endpoint": endpoint}})
    assert says in str(caught.value)


def test_endpoints_of_a_pair_may_be_a_list_or_have_commas() -> None:
    for endpoint in (["tcp://[::1]:1", "tcp://localhost:2"], "tcp://[::1]:1 , tcp://localhost:2"):
        config = validate(AgentConfig, {"controller": {"endpoint": endpoint}})
        assert config.controller.endpoints == ("tcp://[::1]:1", "tcp://localhost:2")


async def test_more_members_than_allowed_are_refused(rig: Rig) -> None:
    hub = await rig.hub(max_members=1)
    first = await rig.member(hub.endpoint, "a")
    await rig.story.until(lambda: first.connected)
    second = await rig.member(hub.endpoint, "b")
    await rig.story.until(lambda: "more than 1 members" in second.summary()["last_error"])
    assert first.connected


async def test_reconfigure_moves_to_another_hub(rig: Rig) -> None:
    one, two = await rig.hub(), await rig.hub()
    link = await rig.member(one.endpoint)
    await rig.story.until(lambda: link.connected)
    section = link._section.model_copy(update={"endpoint": two.endpoint})
    link.reconfigure(section)
    await rig.story.until(lambda: len(two.members()) == 1 and link.connected)
    with pytest.raises(IntentdError, match="restart"):
        link.reconfigure(section.model_copy(update={"enabled": False}))
    with pytest.raises(IntentdError, match="restart"):
        one.reconfigure(HubSection(bind="tcp://127.0.0.1:1"))


async def test_a_port_in_use_is_one_clear_error(rig: Rig) -> None:
    hub = await rig.hub()
    with pytest.raises(IntentdError, match=r"hub.bind: .* in use by another process"):
        await rig.hub(hub.endpoint)


class Encrypted:
    """Key files of one hub and two members."""

    def __init__(self, directory: Path) -> None:
        self.pairs = {name: keys.new_curve_keys() for name in ("hub", "a", "b")}
        for name, pair in self.pairs.items():
            keys.write_curve_keys(directory / name, pair)
        self.allow = directory / "allow"
        self.allow.write_text(f"{self.pairs['a'].public.hex()} agent@a\n")
        self.hub = {"key_file": str(directory / "hub"), "allow_file": str(self.allow)}
        self.directory = directory

    def member(self, name: str, server: str = "hub") -> dict[str, str]:
        return {
            "key_file": str(self.directory / name),
            "server_key_file": str(self.directory / f"{server}.pub"),
        }


async def test_curve_lets_in_only_the_allow_list(rig: Rig) -> None:
    files = Encrypted(rig.directory)
    hub = await rig.hub(**files.hub)
    good = await rig.member(hub.endpoint, "a", **files.member("a"))
    await rig.story.until(lambda: good.connected)
    stranger = await rig.member(hub.endpoint, "b", **files.member("b"))
    plain = await rig.member(hub.endpoint, "c")
    wrong = await rig.member(hub.endpoint, "d", **files.member("a", server="b"))
    impostor = await rig.member(hub.endpoint, "e", **files.member("a"))
    await rig.story.until(lambda: "this key is for agent@a" in impostor.summary()["last_error"])
    metrics = hub._kit.metrics.registry
    await rig.story.until(
        lambda: (
            (metrics.get_sample_value("intentd_link_dropped_total", {"reason": "denied_key"}) or 0)
            >= 1
        )
    )
    for link, says in (
        (stranger, "controller.key_file: its public key is not on the other side's list"),
        (plain, "controller.key_file: empty here, but the other side asks for keys"),
        (wrong, "controller.server_key_file: not the other side's public key"),
    ):
        await rig.story.until(lambda link=link, says=says: _last_error(link).startswith(says))
    assert not any(link.connected for link in (stranger, plain, wrong, impostor))
    files.allow.write_text(files.allow.read_text() + f"{files.pairs['b'].public.hex()}\n")
    hub.reconfigure(hub._section)
    await rig.story.until(lambda: stranger.connected)
    assert {member.name for member in hub.members()} == {"a", "b"}


def _last_error(link: MemberLink) -> str:
    return str(link.summary()["last_error"])


async def test_keys_that_only_the_member_has_are_told_and_mended(rig: Rig) -> None:
    files = Encrypted(rig.directory)
    hub = await rig.hub()
    link = await rig.member(hub.endpoint, "a", **files.member("a"))
    says = "controller.key_file: set here, but the other side has no keys"
    await rig.story.until(lambda: _last_error(link) == says)
    await hub.stop()
    await rig.hub(hub.endpoint, **files.hub)
    await rig.story.until(lambda: link.connected)


async def test_a_revoked_key_is_cut_off(rig: Rig) -> None:
    files = Encrypted(rig.directory)
    hub = await rig.hub(**files.hub)
    link = await rig.member(hub.endpoint, "a", **files.member("a"))
    await rig.story.until(lambda: link.connected)
    files.allow.write_text("")
    hub.reconfigure(hub._section)
    await rig.story.until(lambda: ("goodbye", "a", "key revoked") in rig.story.events)
    await rig.story.until(lambda: not link.connected)


# -- any bytes ------------------------------------------------------------------------------


@given(st.binary())
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    with contextlib.suppress(WireError):
        decode(data)


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


_FIELDS = (
    *("role", "host", "name", "version", "boot", "policies", "capabilities", "sequence", "body"),
    *("application", "era", "number", "issued_wall_s", "applied", "reason", "controller"),
    "report_interval_s",
)


@given(
    st.sampled_from(["hello", "report", "policy", "ack", "welcome", "refusal", "goodbye", "x"]),
    _PLAIN,
    st.dictionaries(
        st.sampled_from(
            [
                "role",
                "host",
                "name",
                "version",
                "boot",
                "policies",
                "capabilities",
                "sequence",
                "body",
                "application",
                "era",
                "number",
                "issued_wall_s",
                "applied",
                "reason",
                "controller",
                "report_interval_s",
            ]
        ),
        _PLAIN,
    )
    | _PLAIN,
)
def test_any_structure_is_a_message_or_refused(name: str, version: Any, body: Any) -> None:
    with contextlib.suppress(WireError):
        decode(msgpack.packb([name, version, body]))
    with contextlib.suppress(WireError):
        decode(msgpack.packb([name, 1, body]))


def test_bounds_of_the_decoder() -> None:
    for data, expected in (
        (b"\x00" * ((4 << 20) + 1), "at most"),
        (b"\xdd\xff\xff\xff\xff", "within bounds"),
        (b"\xdf\xff\xff\xff\xff", "within bounds"),
        (b"\xc6\xff\xff\xff\xff", "within bounds"),
        (b"\x91" * 100_000, "within bounds"),
        (msgpack.packb(msgpack.ExtType(3, b"x")), "within bounds"),
        (msgpack.packb(["hello", 99, {}]), "newer than 1: upgrade"),
        (b"\x81\x01\x02", "within bounds"),
    ):
        with pytest.raises(WireError, match=expected):
            decode(data)
    with pytest.raises(WireError, match="at most"):
        encode(Report("b", 1, {}, {"x": b"\x00" * (4 << 20)}))


def mutations(seed: int, count: int) -> list[bytes]:
    """Valid messages with bytes changed, cut, doubled and repeated, and plain noise."""
    rng = random.Random(seed)
    messages: list[Message] = [
        Hello("agent", "h", "zz", "1", "b", {"flows": [1, 2]}, {"domains": ["x"]}),
        Report("b", 1, {"flows": [1, 2]}, {"flows": {"d": {"sample": [[0.5, 10]]}}}),
        policy(1, domains=[]),
        PolicyAck("flows", 1, 1, True),
        Welcome("c", "b", 1.0),
        Refusal("no"),
    ]
    made = []
    for _ in range(count):
        data = bytearray(encode(rng.choice(messages)))
        for _ in range(rng.randint(1, 8)):
            match rng.randrange(4):
                case 0:
                    data[rng.randrange(len(data))] = rng.randrange(256)
                case 1:
                    del data[rng.randrange(len(data)) :]
                case 2:
                    data[rng.randrange(len(data) + 1) : 0] = rng.randbytes(rng.randint(1, 9))
                case 3:
                    data += data[: rng.randrange(len(data) + 1)]
            data = data or bytearray(b"\x00")
        made.append(bytes(data))
    return made


async def test_a_hub_and_a_member_live_through_noise(rig: Rig) -> None:
    """Mutated frames to the hub, and a hostile hub to a member: counted, refused, no crash."""
    hub = await rig.hub()
    good = await rig.member(hub.endpoint)
    await rig.story.until(lambda: good.connected)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer, router = context.socket(zmq.DEALER), context.socket(zmq.ROUTER)
    for socket in (dealer, router):
        socket.setsockopt(zmq.SNDHWM, 0)
    dealer.connect(hub.endpoint)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    refusals: list[Message] = []
    attacker = ZmqStream(dealer, lambda parts: refusals.append(decode(parts[0])))
    attacker.start()
    for number, data in enumerate(mutations(1, 3000)):
        attacker.send([data] * (1 + number % 2))
        if number % 50 == 0:
            await asyncio.sleep(0)
    victims: list[bytes] = []
    hostile = ZmqStream(router, lambda parts: victims.append(parts[0]))
    hostile.start()
    victim = await rig.member(f"tcp://127.0.0.1:{port}", "v")
    await rig.story.until(lambda: bool(victims))
    for number, data in enumerate(mutations(2, 3000)):
        hostile.send([victims[-1], data])
        if number % 50 == 0:
            await asyncio.sleep(0)
    await rig.story.until(lambda: any(isinstance(message, Refusal) for message in refusals))
    reports = rig.story.count("report")
    await rig.story.until(lambda: rig.story.count("report") >= reports + 2)
    assert good.connected
    assert victim.summary()["last_error"]
    hostile.stop()
    attacker.stop()
    await rig.close(victim)
    context.term()


def test_a_members_row_is_plain() -> None:
    member = Member("agent", "a", "h", "1", "b", b"id", {}, {}, 0.0, 1.0)
    assert member.to_plain(3.0)["heard_s_ago"] == 2.0
    assert to_plain(Refusal("x")) == ["refusal", 1, {"reason": "x"}]
