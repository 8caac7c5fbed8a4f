import pytest

from intentd.core.errors import StateError
from intentd.core.sim.engine import Engine


def test_events_run_in_order_of_time_then_of_asking() -> None:
    engine = Engine()
    seen: list[tuple[str, float]] = []
    engine.at(2.0, lambda: seen.append(("b", engine.now)))
    engine.at(1.0, lambda: seen.append(("a", engine.now)))
    engine.at(2.0, lambda: seen.append(("c", engine.now)))
    engine.after(0.5, lambda: engine.after(1.0, lambda: seen.append(("d", engine.now))))
    assert engine.run() == 5
    assert seen == [("a", 1.0), ("d", 1.5), ("b", 2.0), ("c", 2.0)]


def test_cancelled_events_do_not_run_and_until_stops_the_clock_there() -> None:
    engine = Engine()
    seen: list[int] = []
    engine.at(1.0, lambda: seen.append(1)).cancel()
    engine.at(3.0, lambda: seen.append(3))
    assert engine.run(until=2.0) == 0
    assert (engine.now, engine.next_time()) == (2.0, 3.0)
    assert engine.run(max_events=5) == 1
    assert seen == [3]
    assert not engine.step()


def test_the_past_is_refused() -> None:
    engine = Engine(5.0)
    with pytest.raises(StateError):
        engine.at(4.0, lambda: None)
    with pytest.raises(StateError):
        engine.after(float("nan"), lambda: None)
