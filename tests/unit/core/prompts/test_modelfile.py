"""Trained models as files: the same decisions after a round trip, nothing executed, all checked."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.prompts import chooser
from intentd.core.prompts.cache import gate
from intentd.core.prompts.cascade import PRIOR_AGREEMENT, TrainedCascade
from intentd.core.prompts.modelfile import HEADER, decode_model, encode_model, load_router
from intentd.core.prompts.router import RouterModel, TermWeights, Trees
from intentd.core.prompts.shape import SHAPE_COUNT


def trees(seed: int, features: int) -> Trees:
    """Two trees of one split each."""
    rng = np.random.default_rng(seed)
    return Trees(
        np.array([[rng.integers(features), -1, -1], [rng.integers(features), -1, -1]]),
        rng.normal(size=(2, 3)),
        np.array([[1, 0, 0], [2, 0, 0]]),
        np.array([[2, 0, 0], [1, 0, 0]]),
        rng.normal(size=(2, 3)),
    )


def router_model() -> RouterModel:
    rng = np.random.default_rng(5)
    heads, dimensions, kept, seen = 2, 6, 3, 12
    width = kept + SHAPE_COUNT
    vectors = rng.normal(size=(seen, dimensions))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return RouterModel(
        weak="small",
        strong="large",
        mean_gain=0.1,
        text=TermWeights({"sum": 0, "poem": 1}, np.ones(2), rng.normal(size=(2, heads))),
        text_intercepts=rng.normal(size=heads),
        middle=np.zeros(dimensions),
        components=rng.normal(size=(dimensions, kept)),
        dense_mean=np.zeros(width),
        dense_scale=np.ones(width),
        linear=rng.normal(size=(width + 1, heads)) / 10,
        trees=(trees(1, width), trees(2, width)),
        seen=vectors.astype(np.float32),
        seen_gain=rng.normal(size=seen),
        neighbours=5,
        stack=rng.normal(size=3 * heads + 1),
        stack_mean=np.zeros(3 * heads + 1),
        stack_scale=np.ones(3 * heads + 1),
        least_similarity=-1.0,
        labels=seen,
    )


def gate_model() -> gate.GateModel:
    return gate.GateModel(trees(3, len(gate.FEATURES)), {"card": 2.5, "lost": 4.0}, 0.42)


def chooser_model() -> chooser.ChooserModel:
    levels = len(chooser.LEVELS) - 1
    made = tuple(trees(seed, chooser.FEATURE_COUNT) for seed in range(levels))
    return chooser.ChooserModel(made, 0.2, 0.3)


def test_a_router_decides_alike_after_the_round_trip() -> None:
    model = router_model()
    data = encode_model(model, {"files": ["a"]})
    assert encode_model(model, {"files": ["a"]}) == data
    trained = decode_model(data, kind="router")
    again = trained.model
    assert isinstance(again, RouterModel)
    assert (trained.kind, trained.made) == ("router", {"files": ["a"]})
    for prompt in ("sum 3 and 4", "a poem"):
        for vector in np.eye(6):
            one, other = model.predict(prompt, vector), again.predict(prompt, vector)
            assert (one.known, one.gain) == (other.known, pytest.approx(other.gain, abs=2e-3))
    router = load_router([data], lambda texts: np.eye(6)[: len(texts)], {"small": "mini"})
    assert router.predict("sum", "mini", "large").known
    assert not router.predict("sum", "small", "large").known


def test_gates_cascades_and_choosers_come_back_whole() -> None:
    model = gate_model()
    again = decode_model(encode_model(model, {})).model
    assert isinstance(again, gate.GateModel)
    pair = ("I lost my card", "my card is lost", 0.9)
    assert again.judge(*pair) == model.judge(*pair)
    assert again.chances(np.zeros((3, 2, len(gate.FEATURES)))).shape == (3, 2)
    cascade = TrainedCascade(PRIOR_AGREEMENT, 0.31, "a", ("b", "c"), "d")
    assert decode_model(encode_model(cascade, {})).model == cascade
    chosen = chooser_model()
    other = decode_model(encode_model(chosen, {})).model
    assert isinstance(other, chooser.ChooserModel)
    asked = ("And her sister?", ["Who was Ada?", "A mathematician."])
    assert other.chances(*asked) == chosen.chances(*asked)


def test_many_rows_are_summed_as_one_is() -> None:
    model = trees(7, 4)
    rows = np.random.default_rng(1).normal(size=(20, 4))
    assert model.sums(rows) == pytest.approx([model.sum(row) for row in rows])


def changed(data: bytes, **arrays: Any) -> bytes:
    """The file with arrays (dots as __) or header fields replaced; None leaves one out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            name = info.filename.removesuffix(".npy").replace(".", "__")
            raw: bytes | None = old.read(info)
            if info.filename == HEADER:
                header = json.loads(old.read(info))
                given = {key: value for key, value in arrays.items() if key in header}
                body = {key: value for key, value in arrays.items() if key in header["body"]}
                raw = json.dumps(header | given | {"body": header["body"] | body}).encode()
            elif name in arrays:
                buffer = io.BytesIO()
                if arrays[name] is not None:
                    np.save(buffer, arrays[name])
                raw = buffer.getvalue() or None
            if raw is not None:
                new.writestr(info.filename, raw)
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"format": "x"}, "format"),
        ({"version": 2}, "version"),
        ({"kind": "dragon"}, "kind"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": None}, "threshold"),
        ({"features": ["cosine"]}, "features"),
        ({"idf": None}, "idf"),
        ({"idf": np.array([1.0])}, "idf"),
        ({"idf": np.array([1.0, np.nan])}, "finite"),
        ({"idf": np.array(["a", "b"])}, "numbers"),
        ({"trees__left": np.zeros((2, 3), int)}, "children"),
        ({"trees__right": np.full((2, 3), 9)}, "children"),
        ({"trees__feature": np.array([[99, -1, -1]] * 2)}, "features"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change: dict[str, Any], names: str) -> None:
    data = encode_model(gate_model(), {})
    with pytest.raises(InputError, match=names) as caught:
        decode_model(changed(data, **change), name="gate.model")
    assert str(caught.value).startswith("gate.model")
    with pytest.raises(InputError, match="kind"):
        decode_model(data, kind="router")


def test_pickles_are_not_read() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(HEADER, "{}")
        archive.writestr("idf.npy", buffer.getvalue())
    with pytest.raises(InputError):
        decode_model(out.getvalue())


@given(st.binary(max_size=200), st.integers(0, 4000))
def test_no_bytes_break_the_reader(noise: bytes, place: int) -> None:
    data = bytearray(encode_model(TrainedCascade(PRIOR_AGREEMENT, 0.5), {}))
    place %= len(data)
    data[place : place + len(noise)] = noise
    for broken in (bytes(data), noise):
        try:
            decode_model(broken)
        except InputError:
            continue
