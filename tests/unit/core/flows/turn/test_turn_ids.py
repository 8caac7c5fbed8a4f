"""Progress against plain sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from intentd.core.flows.turn.ids import SPAN, Progress

first = st.integers(1, 60)
count = st.integers(1, 8)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("finish"), first, count),
        st.tuples(st.just("announce"), first, count),
        st.tuples(st.just("expire"), first, count),
        st.tuples(st.just("floor"), first, count),
        st.tuples(st.just("merge"), first, count),
    ),
    max_size=25,
)


class Model:
    def __init__(self) -> None:
        self.done: set[int] = set()
        self.lease: set[int] = set()
        self.announced: set[int] = set()

    def settle(self) -> None:
        self.lease -= self.done
        self.announced -= self.done | self.lease


@given(steps)
def test_progress_is_three_sets_with_a_floor(todo: list[tuple[str, int, int]]) -> None:
    progress, model = Progress(), Model()
    for what, at, size in todo:
        ids = set(range(at, at + size))
        if what == "finish":
            assert progress.finish(at, size)
            model.done |= ids
        elif what == "announce":
            progress.announce(at, size)
            model.announced |= ids - model.done - model.lease
        elif what == "expire":
            progress.expire_mask(at - 1, (1 << size) - 1)
            model.lease |= ids - model.done
        elif what == "floor":
            progress.raise_floor(at)
            model.done |= set(range(1, at + 1))
        else:
            mask = (1 << size) - 1
            progress.merge(at, mask << 4, mask << 20, mask << 40)
            model.done |= set(range(1, at + 1)) | {at + 5 + i for i in range(size)}
            model.lease |= {at + 21 + i for i in range(size)} - model.done
            model.announced |= {at + 41 + i for i in range(size)}
        model.settle()
        floor = next(i for i in range(1, 300) if i not in model.done) - 1
        assert progress.floor == floor
        for n in (1, 5, 17, 40, 90):
            below = set(range(1, n)) - model.done
            lease, announced = below & model.lease, below & model.announced
            rest = below - lease - announced
            assert progress.before(n) == (len(rest), len(lease), len(announced))
        assert not progress.done & (progress.lease | progress.announced)
        assert not progress.lease & progress.announced


def test_what_lies_too_far_ahead_is_not_kept() -> None:
    progress = Progress()
    assert not progress.finish(SPAN + 1, 1)
    assert not progress.announce(2**60, 1)
    assert progress.finish(SPAN, 1)
    assert progress.done.bit_length() == SPAN
