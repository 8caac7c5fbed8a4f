"""Texts to unit vectors: MiniLM in a thread of this process, or an embeddings model of the pool."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from intentd.core.errors import IntentdError

_log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
BATCH: Final = 8
REMEMBERED: Final = 2048


class EmbedError(IntentdError):
    """No vectors now: too many texts wait, or the model failed."""


class Embedder(Protocol):
    """space: names the vectors; those of different spaces cannot be compared."""

    space: str

    async def embed(self, texts: Sequence[str], *, urgent: bool = True, by: Any = None) -> Array:
        """(texts, dimensions), rows of length 1. by: the exchange that pays. Raises EmbedError."""

    def known(self, text: str) -> Array | None:
        """Its vector if it was embedded a moment ago."""

    async def close(self) -> None: ...


class LocalModel(Protocol):
    def embed(self, texts: Sequence[str], *, batch: int = 32) -> Array: ...


class _Recent:
    """The last texts' vectors: what was looked up is often stored next."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._vectors: OrderedDict[str, Array] = OrderedDict()

    def get(self, text: str) -> Array | None:
        found = self._vectors.get(text)
        if found is not None:
            self._vectors.move_to_end(text)
        return found

    def keep(self, text: str, vector: Array) -> None:
        self._vectors[text] = vector
        if len(self._vectors) > self._most:
            self._vectors.popitem(last=False)


class LocalEmbedder:
    """One thread, one text a run: int8 scales are shared inside a batch, so a text embedded with
    others would not equal itself embedded alone.

    Urgent texts (a client waits) go before the others; a run takes at most BATCH of these. More
    than max_waiting texts are refused. load: makes the model, in the thread, at the first text.
    """

    def __init__(
        self, load: Callable[[], LocalModel], *, max_waiting: int = 1000, space: str
    ) -> None:
        self.space = space
        self.max_waiting = max_waiting
        self._load = load
        self._model: LocalModel | None = None
        self._urgent: deque[tuple[str, asyncio.Future[Array]]] = deque()
        self._other: deque[tuple[str, asyncio.Future[Array]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedder")
        self._running: asyncio.Task[None] | None = None
        self._recent = _Recent()

    @property
    def loaded(self) -> bool:
        return self._model is not None

    def known(self, text: str) -> Array | None:
        return self._recent.get(text)

    async def embed(self, texts: Sequence[str], *, urgent: bool = True, by: Any = None) -> Array:
        if len(self._urgent) + len(self._other) + len(texts) > self.max_waiting:
            raise EmbedError(f"embedder: {self.max_waiting} texts wait already")
        loop = asyncio.get_running_loop()
        queue = self._urgent if urgent else self._other
        waiting: list[Array | asyncio.Future[Array]] = []
        for text in texts:
            known = self._recent.get(text)
            if known is not None:
                waiting.append(known)
                continue
            future: asyncio.Future[Array] = loop.create_future()
            queue.append((text, future))
            waiting.append(future)
        if (self._urgent or self._other) and self._running is None:
            self._running = loop.create_task(self._run(), name="embedder")
        try:
            rows = [one if isinstance(one, np.ndarray) else await one for one in waiting]
        except BaseException:
            for one in waiting:
                if isinstance(one, asyncio.Future):
                    one.cancel()
            raise
        return np.array(rows, np.float32)

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
        self._thread.shutdown(cancel_futures=True)

    async def _run(self) -> None:
        """Until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._urgent or self._other:
                batch: list[tuple[str, asyncio.Future[Array]]] = []
                while len(batch) < BATCH and (self._urgent or self._other):
                    text, future = (self._urgent or self._other).popleft()
                    if not future.done():
                        batch.append((text, future))
                if not batch:
                    continue
                try:
                    vectors = await loop.run_in_executor(
                        self._thread, self._embed, [text for text, _ in batch]
                    )
                except Exception as error:  # noqa: BLE001  whatever a model raises, callers go on
                    _log.warning("embedder failed", extra={"error": str(error)})
                    failed = EmbedError(f"embedder: {error}")
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(failed)
                    continue
                for (text, future), vector in zip(batch, vectors, strict=True):
                    self._recent.keep(text, vector)
                    if not future.done():
                        future.set_result(vector)
        finally:
            self._running = None

    def _embed(self, texts: list[str]) -> Array:
        if self._model is None:
            self._model = self._load()
        return self._model.embed(texts, batch=1)


class PoolEmbedder:
    """An embeddings model of the pool: any provider's /v1/embeddings, with its price and health.

    call: asks it for the vectors of texts on behalf of `by`.
    """

    def __init__(
        self, call: Callable[[Sequence[str], Any], Awaitable[list[list[float]]]], *, space: str
    ) -> None:
        self.space = space
        self._call = call
        self._recent = _Recent()

    def known(self, text: str) -> Array | None:
        return self._recent.get(text)

    async def embed(self, texts: Sequence[str], *, urgent: bool = True, by: Any = None) -> Array:
        found = {text: self._recent.get(text) for text in texts}
        new = [text for text, vector in found.items() if vector is None]
        if new:
            rows = np.array(await self._call(new, by), np.float32)
            lengths = np.linalg.norm(rows, axis=-1, keepdims=True) if rows.ndim == 2 else None
            if lengths is None or len(rows) != len(new) or not (lengths > 0).all():
                raise EmbedError("embedder: the provider's vectors are not one a text")
            for text, vector in zip(new, rows / lengths, strict=True):
                found[text] = vector
                self._recent.keep(text, vector)
        return np.array([found[text] for text in texts], np.float32)

    async def close(self) -> None:
        """Nothing is held."""
