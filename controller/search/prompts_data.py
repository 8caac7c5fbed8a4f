"""Recorded outcomes and labelled texts as files of JSON lines, and their embeddings, cached."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.core.errors import InputError

TRAIN: Final = "train"
TEST: Final = "test"
Embed = Callable[[Sequence[str]], npt.NDArray[Any]]


def read_rows(path: Path, *, split: str = "") -> list[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file; split keeps those of that split.

    Raises InputError naming the file and line.
    """
    rows = []
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8") as file
        ):
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number}", type(row).__name__, "a JSON object")
                rows.append(row)
    except (OSError, UnicodeDecodeError, EOFError, json.JSONDecodeError) as error:
        raise InputError(str(path), str(error), "a readable file of JSON lines") from None
    return [row for row in rows if row.get("split") == split] if split else rows


def of_split(rows: Iterable[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """The rows of a split, or all of them when the file has no splits."""
    listed = list(rows)
    return [row for row in listed if row.get("split", split) == split]


def train_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows to learn and choose from: the train rows of files with splits, else all rows.

    Raises InputError when there are none.
    """
    rows = [row for path in paths for row in of_split(read_rows(path), TRAIN)]
    if not rows:
        raise InputError("--train", [str(path) for path in paths], "files with train rows")
    return rows


def reported_rows(path: Path) -> list[dict[str, Any]]:
    """Rows to report on: the test rows of a file that has them, else all that are not train rows.

    Raises InputError when there are none: what was learned from is never reported on.
    """
    rows = read_rows(path)
    kept = [row for row in rows if row.get("split") == TEST]
    kept = kept or [row for row in rows if row.get("split") != TRAIN]
    if not kept:
        raise InputError("--test", str(path), "a file with rows that are not train rows")
    return kept


def labelled(rows: list[dict[str, Any]], name: object) -> list[dict[str, Any]]:
    """The rows, which hold texts with labels or pairs of texts. Raises InputError."""
    for number, row in enumerate(rows, 1):
        texts = ("text", "label") if "text" in row else ("a", "b")
        if not all(isinstance(row.get(field), (str, int)) for field in texts):
            got = ", ".join(sorted(row))[:80]
            raise InputError(f"{name}: row {number}", got, "text and label, or a and b")
    return rows


def set_name(path: Path) -> str:
    """A data set's name: its file's, without endings."""
    return path.name.split(".")[0]


def provenance(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and hash of the files a model was learned from."""
    found = []
    for path in paths:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        found.append({"file": path.name, "bytes": len(data), "sha256": digest})
    return found


class CachedEmbedder:
    """Embeddings kept on disk by text, so that a study embeds each text once.

    One file of float16 vectors a process run; bounded by what is asked for. embed: called for
    texts not seen before.
    """

    def __init__(self, embed: Embed, directory: Path) -> None:
        self._embed = embed
        self._directory = directory
        self._known: dict[bytes, npt.NDArray[np.float16]] = {}
        for path in sorted(directory.glob("*.npz")):
            with np.load(path) as saved:
                keys, vectors = saved["keys"], saved["vectors"]
            self._known.update((bytes(key), row) for key, row in zip(keys, vectors, strict=True))

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        keys = [_key(text) for text in texts]
        new = sorted(
            {text for key, text in zip(keys, texts, strict=True) if key not in self._known},
            key=len,
        )
        if new:
            vectors = np.asarray(self._embed(new)).astype(np.float16)
            fresh = [_key(text) for text in new]
            self._known.update(zip(fresh, vectors, strict=True))
            self._save(fresh, vectors)
        return np.array([self._known[key] for key in keys], np.float32)

    def _save(self, keys: list[bytes], vectors: npt.NDArray[np.float16]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        part = self._directory / f".{name}.{os.getpid()}.npz"
        table = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        np.savez(part, keys=table, vectors=vectors)
        part.replace(self._directory / f"{name}.npz")


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "intentd", "embeddings")
