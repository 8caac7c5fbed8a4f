"""Trained decisions as one file: what was learned, from what, and nothing that can run.

A zip of `model.json` (format, version, kind, what it was made of, scalars) and one `.npy` an array;
no pickle. Bytes in and out: who calls reads and writes the file. The same model is the same bytes,
so that `digest` names it. Everything is checked on reading, since a wrong child of a tree would be
a loop in the proxy: sizes, shapes, ranges, finiteness.

Kinds: router (`core.prompts.router.RouterModel`), cache (`cache.gate.GateModel`), cascade
(`cascade.TrainedCascade`), context (`chooser.ChooserModel`).
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.core.errors import InputError
from intentd.core.prompts import chooser, router
from intentd.core.prompts.cache import gate
from intentd.core.prompts.cache.gate import GateModel
from intentd.core.prompts.cascade import AgreementModel, TrainedCascade
from intentd.core.prompts.chooser import ChooserModel
from intentd.core.prompts.router import RouterModel, TermWeights, Trees
from intentd.core.prompts.shape import SHAPE_COUNT

FORMAT: Final = "intentd-prompts-model"
VERSION: Final = 1
HEADER: Final = "model.json"
MAX_BYTES: Final = 512 << 20
MAX_ARRAYS: Final = 256
MAX_NODES: Final = 4096
EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # a zip's earliest date: no clock in the bytes

Model = RouterModel | GateModel | TrainedCascade | ChooserModel
Arrays = Mapping[str, npt.NDArray[Any]]
Plain = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trained:
    """A model as read. made: provenance as JSON types. digest: sha256 of the file, hex."""

    kind: str
    model: Model
    made: Mapping[str, Any]
    digest: str


def encode_model(model: Model, made: Mapping[str, Any]) -> bytes:
    """The file's bytes. made: what it was learned from, for people."""
    kind, pack = _PACKERS[type(model)]
    body, arrays = pack(model)
    header = {"format": FORMAT, "version": VERSION, "kind": kind, "made": made, "body": body}
    made_zip = io.BytesIO()
    with zipfile.ZipFile(made_zip, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
        archive.writestr(zipfile.ZipInfo(HEADER, EPOCH), text, zipfile.ZIP_DEFLATED)
        for name, array in sorted(arrays.items()):
            raw = io.BytesIO()
            np.lib.format.write_array(raw, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", EPOCH), raw.getvalue(), zipfile.ZIP_DEFLATED
            )
    return made_zip.getvalue()


def decode_model(data: bytes, *, name: str = "model file", kind: str = "") -> Trained:
    """A trained model from a file's bytes. Raises InputError naming the file and what is wrong.

    kind: the one expected, "" any.
    """
    try:
        header, arrays = _unzip(data)
        _expect(header.get("format") == FORMAT, "format", header.get("format"), repr(FORMAT))
        version = header.get("version")
        _expect(version == VERSION, "version", version, f"version {VERSION}")
        found = header.get("kind")
        unpack = _UNPACKERS.get(found) if isinstance(found, str) else None
        if unpack is None or (kind and found != kind):
            raise InputError("kind", found, repr(kind) if kind else f"one of {list(_UNPACKERS)}")
        made = header.get("made", {})
        _expect(isinstance(made, dict), "made", made, "a table")
        model = unpack(_Body(_table(header, "body"), arrays))
    except InputError as error:
        raise InputError(f"{name}: {error.field}", error.value, error.expected) from None
    except (
        zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, NotImplementedError,
        OverflowError, RuntimeError, zlib.error,
    ) as error:  # fmt: skip
        text = f"{type(error).__name__}: {error}"
        raise InputError(name, text[:200], "a trained model written by `prompts train`") from None
    return Trained(str(found), model, made, hashlib.sha256(data).hexdigest())


def load_router(
    files: Sequence[bytes], embed: router.Embedder, names: Mapping[str, str] | None = None
) -> router.LearnedRouter:
    """The router of one or more files, one a pair of models. Raises InputError.

    names: the pool's own name of a model as the file calls it, where they differ.
    """
    models = []
    for number, data in enumerate(files):
        model = decode_model(data, name=f"routers[{number}]", kind="router").model
        assert isinstance(model, RouterModel)
        models.append(model.renamed(names or {}))
    return router.LearnedRouter(models, embed)


# -- reading ---------------------------------------------------------------------------------------


def _unzip(data: bytes) -> tuple[Plain, dict[str, npt.NDArray[Any]]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        size = sum(info.file_size for info in infos)
        _expect(len(infos) <= MAX_ARRAYS and size <= MAX_BYTES, "size", size, f"<= {MAX_BYTES}")
        header = json.loads(archive.read(HEADER))
        _expect(isinstance(header, dict), HEADER, type(header).__name__, "a table")
        arrays = {}
        for info in infos:
            if info.filename.endswith(".npy"):
                raw = io.BytesIO(archive.read(info))
                array = np.lib.format.read_array(raw, allow_pickle=False)
                _expect(array.dtype.kind in "fiu", info.filename, array.dtype, "numbers")
                finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
                _expect(finite, info.filename, "not finite", "finite numbers")
                arrays[info.filename.removesuffix(".npy")] = array
    return header, arrays


def _expect(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(field, value, expected)


def _table(plain: Mapping[str, Any], field: str) -> Plain:
    value = plain.get(field)
    _expect(isinstance(value, dict), field, type(value).__name__, "a table")
    assert isinstance(value, dict)
    return value


class _Body:
    """Typed access to a header's body and the arrays."""

    def __init__(self, plain: Plain, arrays: Arrays) -> None:
        self._plain = plain
        self._arrays = arrays

    def number(self, field: str, least: float = -1e300, most: float = 1e300) -> float:
        value = self._plain.get(field)
        good = type(value) in (int, float) and least <= float(value or 0) <= most
        _expect(good, f"body.{field}", value, f"a number from {least:g} to {most:g}")
        return float(value)  # type: ignore[arg-type]  # narrowed by type()

    def count(self, field: str, most: int = 10**9) -> int:
        value = self._plain.get(field)
        _expect(type(value) is int and 0 <= value <= most, f"body.{field}", value, f"0 to {most}")
        return int(value)  # type: ignore[arg-type]  # as above

    def text(self, field: str) -> str:
        value = self._plain.get(field)
        _expect(isinstance(value, str) and len(value) <= 512, f"body.{field}", value, "text")
        return str(value)

    def texts(self, field: str) -> list[str]:
        value = self._plain.get(field)
        good = isinstance(value, list) and all(isinstance(one, str) for one in value)
        _expect(good, f"body.{field}", type(value).__name__, "a list of texts")
        assert isinstance(value, list)
        return value

    def array(self, field: str, *shape: int, dtype: Any = np.float64) -> npt.NDArray[Any]:
        """-1 in shape: any length."""
        array = self._arrays.get(field)
        if array is None:
            raise InputError(field, "missing", "an array")
        fits = len(array.shape) == len(shape) and all(
            want in (-1, have) for want, have in zip(shape, array.shape, strict=True)
        )
        _expect(fits, field, array.shape, f"an array of {shape}")
        return np.ascontiguousarray(array, dtype=dtype)

    def trees(self, field: str, features: int) -> Trees:
        """Boosted trees; children come after their parents, so that every walk ends."""
        feature = self.array(f"{field}.feature", -1, -1, dtype=np.int64)
        rows, nodes = feature.shape
        _expect(1 <= nodes <= MAX_NODES and rows >= 1, field, (rows, nodes), "trees with nodes")
        left = self.array(f"{field}.left", rows, nodes, dtype=np.int64)
        right = self.array(f"{field}.right", rows, nodes, dtype=np.int64)
        inner = feature >= 0
        place = np.arange(nodes)[None, :]
        for side in (left, right):
            good = bool((((side > place) & (side < nodes)) | ~inner).all())
            _expect(good, field, "a child out of order", "children after their parents")
        _expect(int(feature.max()) < features, field, int(feature.max()), f"< {features} features")
        return Trees(
            feature,
            self.array(f"{field}.threshold", rows, nodes),
            np.where(inner, left, 0),
            np.where(inner, right, 0),
            self.array(f"{field}.value", rows, nodes),
        )


def _pack_trees(field: str, trees: Trees) -> dict[str, npt.NDArray[Any]]:
    return {
        f"{field}.feature": trees.feature.astype(np.int32),
        f"{field}.threshold": trees.threshold,
        f"{field}.left": trees.left.astype(np.int16),
        f"{field}.right": trees.right.astype(np.int16),
        f"{field}.value": trees.value,
    }


# -- one pair of functions a kind ------------------------------------------------------------------


def _pack_router(model: RouterModel) -> tuple[Plain, dict[str, npt.NDArray[Any]]]:
    body = {
        "weak": model.weak,
        "strong": model.strong,
        "mean_gain": model.mean_gain,
        "terms": list(model.text.places),
        "neighbours": model.neighbours,
        "least_similarity": model.least_similarity,
        "labels": model.labels,
        "heads": len(model.text_intercepts),
        "linears": model.linear.shape[1],
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        # a term's place is its place in the list of terms
        "text.idf": model.text.idf,
        "text.weights": model.text.weights.astype(np.float32),
        "text.intercepts": model.text_intercepts,
        "middle": model.middle,
        "components": model.components,
        "dense.mean": model.dense_mean,
        "dense.scale": model.dense_scale,
        "linear": model.linear,
        "seen": model.seen.astype(np.float16),
        "seen_gain": model.seen_gain.astype(np.float32),
        "stack": model.stack,
        "stack.mean": model.stack_mean,
        "stack.scale": model.stack_scale,
    }
    for number, trees in enumerate(model.trees):
        arrays |= _pack_trees(f"trees{number}", trees)
    return body, arrays


def _unpack_router(body: _Body) -> RouterModel:
    heads, linears = body.count("heads", 64), body.count("linears", 64)
    terms = body.texts("terms")
    middle = body.array("middle", -1)
    components = body.array("components", len(middle), -1)
    width = components.shape[1] + SHAPE_COUNT
    seen = body.array("seen", -1, len(middle), dtype=np.float32)
    columns = 2 * heads + linears + 1
    scale = body.array("stack.scale", columns)
    dense_scale = body.array("dense.scale", width)
    _expect(bool((scale > 0).all() and (dense_scale > 0).all()), "scale", "<= 0", "scales > 0")
    _expect(len(seen) > 0, "seen", 0, "at least one prompt")
    return RouterModel(
        weak=body.text("weak"),
        strong=body.text("strong"),
        mean_gain=body.number("mean_gain", -1, 1),
        text=TermWeights(
            {term: place for place, term in enumerate(terms)},
            body.array("text.idf", len(terms)),
            body.array("text.weights", len(terms), heads),
        ),
        text_intercepts=body.array("text.intercepts", heads),
        middle=middle,
        components=components,
        dense_mean=body.array("dense.mean", width),
        dense_scale=dense_scale,
        linear=body.array("linear", width + 1, linears),
        trees=tuple(body.trees(f"trees{number}", width) for number in range(heads)),
        seen=seen,
        seen_gain=body.array("seen_gain", len(seen)),
        neighbours=max(1, body.count("neighbours")),
        stack=body.array("stack", columns),
        stack_mean=body.array("stack.mean", columns),
        stack_scale=scale,
        least_similarity=body.number("least_similarity", -1, 1),
        labels=body.count("labels"),
    )


def _pack_gate(model: GateModel) -> tuple[Plain, dict[str, npt.NDArray[Any]]]:
    stems = sorted(model.idf)
    body = {"threshold": model.threshold, "stems": stems, "features": list(gate.FEATURES)}
    idf = np.array([model.idf[stem] for stem in stems], np.float64)
    return body, {"idf": idf, **_pack_trees("trees", model.trees)}


def _unpack_gate(body: _Body) -> GateModel:
    names = body.texts("features")
    _expect(tuple(names) == gate.FEATURES, "body.features", names, f"{list(gate.FEATURES)}")
    stems = body.texts("stems")
    idf = body.array("idf", len(stems))
    return GateModel(
        body.trees("trees", len(gate.FEATURES)),
        dict(zip(stems, idf.tolist(), strict=True)),
        body.number("threshold", 0, 1),
    )


def _pack_cascade(model: TrainedCascade) -> tuple[Plain, dict[str, npt.NDArray[Any]]]:
    agreement = model.agreement
    body = {
        "first": model.first,
        "compared": list(model.compared),
        "second": model.second,
        "threshold": model.threshold,
        "bias": agreement.bias,
    }
    return body, {
        "weights": np.array(agreement.weights),
        "centres": np.array(agreement.centres),
        "scales": np.array(agreement.scales),
    }


def _unpack_cascade(body: _Body) -> TrainedCascade:
    weights, centres, scales = (
        tuple(body.array(name, -1).tolist()) for name in ("weights", "centres", "scales")
    )
    return TrainedCascade(
        AgreementModel(weights, body.number("bias"), centres, scales),
        body.number("threshold", 0, 1),
        body.text("first"),
        tuple(body.texts("compared")),
        body.text("second"),
    )


def _pack_context(model: ChooserModel) -> tuple[Plain, dict[str, npt.NDArray[Any]]]:
    body = {
        "threshold": model.threshold,
        "further": model.further,
        "levels": len(model.trees),
        "features": chooser.FEATURE_COUNT,
    }
    arrays: dict[str, npt.NDArray[Any]] = {}
    for number, trees in enumerate(model.trees):
        arrays |= _pack_trees(f"trees{number}", trees)
    return body, arrays


def _unpack_context(body: _Body) -> ChooserModel:
    features = body.count("features")
    _expect(
        features == chooser.FEATURE_COUNT, "body.features", features, f"{chooser.FEATURE_COUNT}"
    )
    levels, wanted = body.count("levels"), len(chooser.LEVELS) - 1
    _expect(levels == wanted, "body.levels", levels, f"{wanted} levels")
    return ChooserModel(
        tuple(body.trees(f"trees{number}", features) for number in range(levels)),
        body.number("threshold", 0, 1),
        body.number("further", 0, 1),
    )


_PACKERS: Final[Mapping[type[Any], tuple[str, Callable[[Any], tuple[Plain, dict[str, Any]]]]]] = {
    RouterModel: ("router", _pack_router),
    GateModel: ("cache", _pack_gate),
    TrainedCascade: ("cascade", _pack_cascade),
    ChooserModel: ("context", _pack_context),
}
_UNPACKERS: Final[Mapping[str, Callable[[_Body], Model]]] = {
    "router": _unpack_router,
    "cache": _unpack_gate,
    "cascade": _unpack_cascade,
    "context": _unpack_context,
}
