"""What the driver of a Ray cluster decides, event by event; no Ray here."""

from __future__ import annotations

from typing import Any

import pytest

from intentd.daemons.gpu.ray_fleet import Call, Create, Fleet, Key, Kill, Say

KILL = (9, 0.0)


class World:
    """A fleet and the slots as they would answer."""

    def __init__(self, nodes: dict[str, int], expected: tuple[str, ...] = ()) -> None:
        self.now = 0.0
        self.fleet = Fleet(10.0, 6.0, 1.0, self.now, expected)
        self.nodes = nodes
        self.slots: dict[Key, dict[str, Any]] = {}
        self.numbers: dict[Key, int] = {}
        self.said: list[dict[str, Any]] = []
        self.calls: list[Call] = []
        self.killed: list[Key] = []

    def tick(self) -> None:
        self.fleet.tick(self.now)
        self.take()

    def look(self) -> None:
        seen = [(name, f"id-{name}", gpus) for name, gpus in self.nodes.items()]
        self.fleet.nodes_seen(seen, self.now)
        self.take()

    def take(self) -> list[Create]:
        made = []
        for act in self.fleet.take():
            match act:
                case Say(message):
                    self.said.append(message)
                case Create():
                    self.numbers[act.key] = act.number
                    made.append(act)
                case Call():
                    self.calls.append(act)
                case Kill(key, _):
                    self.killed.append(key)
        return made

    def state(self, run: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"run": run, "progress": None, "port": 4000}

    def up(self, key: Key, run: dict[str, Any] | None = None) -> None:
        hello = {"gpu": str(key[1]), "address": "10.0.0.1", **self.state(run)}
        self.fleet.up(key, self.numbers[key], hello, self.now)
        self.take()

    def heard(self, key: Key, run: dict[str, Any] | None = None) -> None:
        self.fleet.heard(key, self.numbers[key], self.state(run), self.now)
        self.take()

    def kinds(self) -> list[str]:
        said, self.said = self.said, []
        return [message["kind"] for message in said]

    def called(self) -> list[tuple[Key, str]]:
        calls, self.calls = self.calls, []
        return [(call.key, call.method) for call in calls]

    def start(self, job: int, devices: dict[str, list[int]], epoch: int = 1) -> None:
        order = {"command": ["x"], "env": {}, "workdir": "/", "make_workdir": False}
        message = {"job": job, "epoch": epoch, "devices": devices, "order": order}
        self.fleet.start(message, self.now)
        self.take()

    def began(self, key: Key, run: str, **answer: Any) -> None:
        self.fleet.began(key, self.numbers[key], run, answer or {"at_s": 1.0})
        self.take()


def fall_silent(world: World) -> None:
    """Node b, from 0 on; it is struck off at 3."""
    number = world.numbers["b", 0]
    world.fleet.down(("b", 0), number, world.now, dead=False)
    world.now = 3.0
    world.tick()
    assert world.killed == [("b", 0)]
    world.fleet.buried(("b", 0), number, world.now)
    world.take()


def running(run: str, **more: Any) -> dict[str, Any]:
    return {"run": run, "state": "running", "stopping": False, "status": 0, "detail": "", **more}


def ended(run: str, status: int = 0) -> dict[str, Any]:
    return running(run, state="ended", status=status, ended_s=2.0)


@pytest.fixture
def world() -> World:
    it = World({"a": 2, "b": 1})
    it.look()
    for key in (("a", 0), ("a", 1), ("b", 0)):
        it.up(key)
    it.fleet.told_all()
    assert it.kinds() == ["node_joined", "node_joined"]
    return it


def test_a_node_joins_when_all_its_slots_are_there() -> None:
    it = World({"a": 2})
    it.look()
    it.up(("a", 1))
    assert it.kinds() == []
    it.up(("a", 0))
    assert it.said == [{"kind": "node_joined", "node": "a", "gpus": 2}]


def test_a_gang_begins_when_all_began_and_ends_when_all_ended(world: World) -> None:
    world.start(7, {"a": [0, 1], "b": [0]})
    orders = [call.args[0]["env"] for call in world.calls]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in orders] == ["0,1", "0"]
    assert [env["INTENTD_NODE_RANK"] for env in orders] == ["0", "1"]
    assert {env["INTENTD_MASTER_PORT"] for env in orders} == {"4000"}
    assert world.called() == [(("a", 0), "start"), (("b", 0), "start")]
    world.began(("a", 0), "7.1")
    assert world.kinds() == []
    world.began(("b", 0), "7.1")
    assert world.kinds() == ["started"]
    world.heard(("b", 0), ended("7.1"))
    assert world.kinds() == []
    world.heard(("a", 0), ended("7.1"))
    assert world.said[0]["status"] == 0
    assert world.kinds() == ["exited"]
    assert not world.fleet.runs


def test_one_failed_member_ends_the_gang(world: World) -> None:
    world.start(7, {"a": [0], "b": [0]})
    world.began(("a", 0), "7.1")
    world.began(("b", 0), "7.1")
    world.called()
    world.heard(("b", 0), ended("7.1", 3))
    assert world.called() == [(("a", 0), "stop")]
    world.heard(("a", 0), ended("7.1", -9))
    assert [m["status"] for m in world.said if m["kind"] == "exited"] == [-9]


def test_a_slot_that_died_is_replaced_and_its_run_lost_only_then(world: World) -> None:
    world.start(1, {"a": [0]})
    world.began(("a", 0), "1.1")
    world.kinds()
    world.fleet.down(("a", 0), world.numbers["a", 0], world.now, dead=True)
    assert [made.key for made in world.take()] == [("a", 0)]
    assert world.kinds() == []
    world.up(("a", 0))
    assert world.said == [
        {
            "kind": "lost",
            "job": 1,
            "epoch": 1,
            "why": "the slot of GPU 0 of a was lost",
            "began": True,
        }
    ]


def test_a_silent_node_is_lost_after_its_lease_and_taken_again_under_a_new_id(world: World) -> None:
    world.start(1, {"b": [0]})
    world.began(("b", 0), "1.1")
    world.kinds()
    fall_silent(world)
    world.now = 9.0
    world.tick()
    assert world.kinds() == []
    world.now = 10.0
    world.tick()
    assert world.kinds() == ["node_lost", "lost"]
    world.look()  # Ray still lists the old one
    assert "b" not in world.fleet.nodes
    world.fleet.nodes_seen([("b", "id-new", 1)], world.now)
    assert [made.node_id for made in world.take()] == ["id-new"]


def test_a_node_whose_slots_all_died_is_not_lost_but_its_runs_are(world: World) -> None:
    world.start(1, {"b": [0]})
    world.began(("b", 0), "1.1")
    world.kinds()
    world.fleet.down(("b", 0), world.numbers["b", 0], world.now, dead=True)
    world.take()
    world.now = 20.0  # the successor is slow
    world.look()
    world.tick()
    assert world.kinds() == ["lost"]
    world.start(1, {"b": [0]}, epoch=2)
    world.tick()
    assert world.kinds() == []
    world.called()
    world.up(("b", 0))
    assert world.called()[-1] == (("b", 0), "start")
    world.fleet.down(("b", 0), world.numbers["b", 0], world.now, dead=True)
    del world.nodes["b"]  # now Ray says that the node is dead
    world.now = 40.0
    world.look()
    world.tick()
    assert world.kinds() == ["node_lost", "lost"]


def test_a_node_taken_for_lost_is_taken_again_if_it_stays(world: World) -> None:
    fall_silent(world)
    world.now = 10.0
    world.tick()
    assert world.kinds() == ["node_lost"]
    world.now = 99.0
    world.look()
    assert "b" not in world.fleet.nodes
    world.now = 101.0
    world.look()
    world.up(("b", 0))
    assert world.kinds() == ["node_joined"]


def test_a_silent_slot_that_cannot_be_struck_off_is_never_called_lost(world: World) -> None:
    world.start(1, {"b": [0]})
    world.began(("b", 0), "1.1")
    world.kinds()
    world.fleet.down(("b", 0), world.numbers["b", 0], world.now, dead=False)
    for world.now in (3.0, 10.0, 100.0):
        world.tick()
    assert world.killed == [("b", 0)]
    assert world.kinds() == []


def test_silence_that_ends_in_time_loses_nothing(world: World) -> None:
    world.start(1, {"b": [0]})
    world.began(("b", 0), "1.1")
    world.kinds()
    world.fleet.down(("b", 0), world.numbers["b", 0], world.now, dead=False)
    world.now = 2.0
    world.tick()
    world.heard(("b", 0), running("1.1"))
    world.now = 15.0
    world.tick()
    assert world.killed == []
    assert world.kinds() == []


def test_adopted_runs_are_compared_with_what_is_there() -> None:
    it = World({"a": 4}, expected=("a", "gone"))
    it.look()
    for job, slot in ((1, 0), (2, 1), (3, 2)):
        it.fleet.adopt(
            {"job": job, "epoch": 1, "devices": {"a": [slot]}, "began": True, "stop": None}, it.now
        )
    it.fleet.adopt(
        {"job": 5, "epoch": 2, "devices": {"gone": [0]}, "began": True, "stop": [15, 3.0]}, it.now
    )
    it.fleet.told_all()
    it.up(("a", 0), running("1.1"))
    it.up(("a", 1), ended("2.1"))
    it.up(("a", 2), running("4.1"))  # nobody knows it, and job 3 is not there
    it.up(("a", 3))
    told = [(m["kind"], m.get("job")) for m in it.said]
    assert told == [
        ("started", 1),
        ("started", 2),
        ("exited", 2),
        ("lost", 3),
        ("node_joined", None),
    ]
    assert it.called() == [(("a", 2), "stop")]
    it.kinds()
    it.now = 10.0
    it.tick()
    assert it.kinds() == ["node_lost", "lost"]


def test_a_stop_reaches_a_run_that_is_adopted_later() -> None:
    it = World({"a": 1}, expected=("a",))
    it.look()
    it.fleet.adopt(
        {"job": 1, "epoch": 1, "devices": {"a": [0]}, "began": True, "stop": [15, 3.0]}, it.now
    )
    it.up(("a", 0), running("1.1"))
    assert it.calls == [Call(("a", 0), it.numbers["a", 0], "stop", ("1.1", 15, 3.0), "1.1")]


def test_a_start_nobody_answered_is_stopped_and_then_looked_for(world: World) -> None:
    world.start(1, {"a": [0]})
    world.called()
    number = world.numbers["a", 0]
    world.fleet.call_failed(("a", 0), number, "1.1")
    world.take()
    assert world.called() == [(("a", 0), "stop")]
    world.heard(("a", 0))
    world.called()
    assert world.kinds() == []
    world.fleet.stopped(("a", 0), number, "1.1")
    world.heard(("a", 0))
    assert world.kinds() == ["lost"]


def test_a_start_waits_for_its_node_and_is_given_back_if_there_is_none(world: World) -> None:
    world.start(1, {"nowhere": [0]})
    assert world.said[0]["began"] is False
    assert world.kinds() == ["lost"]
    late = World({"a": 1}, expected=("a",))
    late.start(2, {"a": [0]})
    late.look()
    assert late.called() == []
    late.up(("a", 0))
    assert late.called() == [(("a", 0), "start")]


def test_a_refused_start_never_began(world: World) -> None:
    world.start(1, {"a": [0]})
    world.began(("a", 0), "1.1", refused="another run is here")
    assert world.said[0]["began"] is False
    assert world.kinds() == ["lost"]


def test_a_stop_before_the_start_was_sent() -> None:
    it = World({"a": 1}, expected=("a",))
    it.start(2, {"a": [0]})
    it.fleet.stop({"job": 2, "epoch": 1, "signal": 15, "grace_s": 1.0}, it.now)
    it.take()
    assert it.kinds() == ["lost"]
    it.look()
    it.up(("a", 0))
    assert it.called() == []


def test_slots_of_a_former_driver_are_found_once() -> None:
    it = World({"a": 1})
    number = it.fleet.found(("a", 0), "id-a", it.now)
    assert number > 0
    assert it.fleet.found(("a", 0), "id-a", it.now) == 0
    assert it.fleet.found(("a", 1), "id-other", it.now) == 0
    it.look()
    it.numbers["a", 0] = number
    it.up(("a", 0))
    assert it.kinds() == ["node_joined"]
