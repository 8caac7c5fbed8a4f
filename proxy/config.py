"""Configuration of the proxy: where it listens, its models, keys, budgets and bounds."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Final
from urllib.parse import SplitResult, urlsplit

from pydantic import BeforeValidator, Field, model_validator

from intentd.core.errors import ConfigError
from intentd.core.prompts.budgets import PERIODS, UNITS
from intentd.core.prompts.models import ModelSpec
from intentd.core.prompts.money import Price, parse_dollars, price_at
from intentd.daemons.kit.config import (
    DaemonConfig,
    Duration,
    Section,
    Size,
    check_database,
    is_loopback,
    split_address,
)
from intentd.proxy.config_cache import CacheSection
from intentd.proxy.service import check_pool, offered_types

UNKNOWN_WINDOW: Final = 1 << 30
DEFAULT_BIND: Final = "127.0.0.1:7450"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}\Z")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class ListenSection(Section):
    """Where applications send their prompts."""

    bind: str = Field(
        default=DEFAULT_BIND,
        description="address:port of the API. Port 0 takes a free one. Off loopback only with "
        "keys.required.",
    )
    max_body_bytes: Size = Field(
        default=16 << 20, description="Largest request body; larger ones get 413.", ge=1024
    )
    max_requests: int = Field(
        default=4096,
        description="Requests worked on at once; more get 503 with Retry-After.",
        ge=1,
    )

    @model_validator(mode="after")
    def _check(self) -> ListenSection:
        split_address(self.bind, "bind")
        return self


def _as_text(value: object) -> object:
    """A price written as a number, exactly as it stands in the file: 0.15 is "0.15"."""
    return str(value) if type(value) in (int, float) else value


Dollars = Annotated[str, BeforeValidator(_as_text)]


class PriceSection(Section):
    """What a model costs from one day on."""

    since: str = Field(description="First day of these prices (UTC), such as 2026-11-01.")
    price_in: Dollars = Field(description="Dollars a million input tokens.")
    price_out: Dollars = Field(description="Dollars a million output tokens.")
    price_cached_in: Dollars = Field(
        default="", description="Dollars a million input tokens from the provider's prompt cache."
    )

    @model_validator(mode="after")
    def _check(self) -> PriceSection:
        self.price()
        return self

    def price(self) -> Price:
        return read_price(self.price_in, self.price_out, self.price_cached_in, self.since)


class ModelSection(Section):
    """One upstream model. Clients name it; what they cannot name is where it is or its key."""

    name: str = Field(description="What clients say in `model`.")
    base_url: str = Field(
        default="",
        description="The provider's OpenAI-compatible root, such as https://api.openai.com/v1.",
    )
    provider: str = Field(
        default="openai",
        description="openai: anything that speaks its API, called directly. litellm: other "
        "providers, through that library (extra proxy-litellm); upstream_model is then its name, "
        "such as anthropic/claude-sonnet-4-5, and base_url may be empty.",
        pattern="^(openai|litellm)$",
    )
    params: dict[str, Any] = Field(
        default={},
        description="With litellm: what its calls take beside OpenAI's fields, such as "
        "api_version.",
    )
    upstream_model: str = Field(
        default="", description="The provider's own name of it. Empty: the same as name."
    )
    api_key_env: str = Field(
        default="",
        description="Environment variable that holds the provider's key. Empty: no key is sent.",
    )
    price_in: Dollars = Field(default="0", description="Dollars a million input tokens.")
    price_out: Dollars = Field(default="0", description="Dollars a million output tokens.")
    price_cached_in: Dollars = Field(
        default="",
        description="Dollars a million input tokens read from the provider's prompt cache. "
        "Empty: price_in.",
    )
    prices: tuple[PriceSection, ...] = Field(
        default=(),
        description="Later prices, each from a day on; the ones above hold until the first. Keep "
        "the old ones, and announce new ones before their day.",
    )
    window: int = Field(default=0, description="Context window in tokens; 0: not checked.", ge=0)
    max_output_tokens: int = Field(
        default=4096,
        description="Cap on an answer where a budget has to hold money for it and the client "
        "names no smaller one; it is sent upstream.",
        ge=1,
    )
    max_tokens_field: str = Field(
        default="max_tokens",
        description="Field that carries the cap: max_tokens or max_completion_tokens.",
        pattern="^(max_tokens|max_completion_tokens)$",
    )
    min_bytes_per_token: float = Field(
        default=1.0,
        description="Lower bound on the bytes of a token, to count what a prompt may cost at most "
        "before it is sent. 1 is safe for every tokenizer; 3 holds for English prose.",
        ge=1,
        le=16,
    )
    image_tokens: int = Field(
        default=2000, description="Most input tokens an image or a file counts for.", ge=0
    )
    max_concurrency: int = Field(
        default=0, description="Calls to it at once; 0: no limit. More wait, see upstream.", ge=0
    )
    fallbacks: tuple[str, ...] = Field(
        default=(),
        description="Models asked, in order, when this one fails before its first token.",
    )
    capabilities: tuple[str, ...] = Field(
        default=(),
        description="What it can do: tools, json, images, audio, files, logprobs, embeddings, or "
        "words of yours for filters. Named, it is asked nothing else; empty, it is not doubted.",
    )
    regions: tuple[str, ...] = Field(
        default=(), description="Where it is offered, for filters. Empty: everywhere."
    )
    quality: float | None = Field(
        default=None, description="0 to 1 from public benchmarks, for filters.", ge=0, le=1
    )
    stream_usage: bool = Field(
        default=True,
        description="Ask it for the token counts of streams (stream_options.include_usage). "
        "Without them streams are booked by estimate.",
    )

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if not _NAME.match(self.name):
            raise ConfigError("name", self.name, "letters, digits and ._:/+-, at most 128")
        try:
            parts = urlsplit(self.base_url)
        except ValueError:  # such as brackets that are no IPv6 address
            raise ConfigError(
                "base_url", "(hidden)", "http://HOST/... or https://HOST/..."
            ) from None
        if self.params and self.provider != "litellm":
            raise ConfigError("params", "(hidden)", "nothing without provider = litellm")
        optional = self.provider == "litellm" and not self.base_url
        if not optional and (parts.scheme not in ("http", "https") or not _has_place(parts)):
            raise ConfigError("base_url", self.base_url, "http://HOST/... or https://HOST/...")
        if parts.username or parts.query or parts.fragment:
            raise ConfigError("base_url", "(hidden)", "no credentials, query or fragment")
        if self.api_key_env and not _ENV_NAME.match(self.api_key_env):
            # The value may be a key somebody pasted: never shown.
            raise ConfigError("api_key_env", "(hidden)", "the NAME of an environment variable")
        days = [price.since for price in self.history()]
        for index, day in enumerate(days[1:]):
            if day <= days[index]:
                raise ConfigError(f"prices[{index}].since", day, f"a day after {days[index]}")
        return self

    def spec(self, day: str) -> ModelSpec:
        """What pipelines know of it on a day (UTC)."""
        return ModelSpec(
            self.name,
            self.upstream_model,
            self.base_url,
            price_at(self.history(), day),
            self.window or UNKNOWN_WINDOW,
            self.max_output_tokens,
            frozenset(self.capabilities),
            frozenset(self.regions),
            self.quality,
            max_concurrency=self.max_concurrency,
        )

    def history(self) -> tuple[Price, ...]:
        """Every price it ever had here, oldest first."""
        first = read_price(self.price_in, self.price_out, self.price_cached_in)
        return (first, *(later.price() for later in self.prices))


def _has_place(parts: SplitResult) -> bool:
    """Whether host and port of a URL can be meant; reading a port may raise."""
    try:
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def read_price(price_in: str, price_out: str, price_cached_in: str, since: str = "") -> Price:
    """Raises InputError naming the field."""
    cached = parse_dollars(price_cached_in, "price_cached_in") if price_cached_in else None
    return Price(
        parse_dollars(price_in, "price_in"),
        parse_dollars(price_out, "price_out"),
        cached,
        since or "1970-01-01",
    )


class UpstreamSection(Section):
    """How providers are called, and what happens when they fail."""

    connect_timeout_s: Duration = Field(
        default=5.0, description="Longest wait for a connection.", gt=0
    )
    first_token_timeout_s: Duration = Field(
        default=120.0,
        description="Longest wait for an answer, or for a stream's first event.",
        gt=0,
    )
    idle_timeout_s: Duration = Field(
        default=60.0, description="Longest silence between two events of a stream.", gt=0
    )
    total_timeout_s: Duration = Field(
        default=600.0,
        description="Longest time for one request of a client from its first call on: all calls of "
        "its service type and their retries included.",
        gt=0,
    )
    attempts: int = Field(
        default=3,
        description="A request of a client is given up after so many failed calls, fallbacks "
        "included. A service type makes each of its own calls once beside the repeats.",
        ge=1,
        le=10,
    )
    retry_share: float = Field(
        default=0.2,
        description="Retries may be this share of requests in the long run, so that a failing "
        "provider is not hit harder for failing.",
        ge=0,
        le=1,
    )
    backoff_s: Duration = Field(
        default=0.2, description="First wait before a retry; doubles, with jitter.", ge=0
    )
    max_retry_after_s: Duration = Field(
        default=10.0,
        description="A provider that asks for a longer wait is not waited for, but passed by.",
        ge=0,
    )
    cooldown_failures: int = Field(
        default=5, description="Failures in a row after which a model is left alone.", ge=1
    )
    cooldown_s: Duration = Field(
        default=5.0,
        description="How long; then one request probes it. Doubles while probes fail, up to "
        "twelve times this.",
        gt=0,
    )
    prompt_cache_s: Duration = Field(
        default=300.0,
        description="How long providers keep the beginning of a conversation in their prompt "
        "caches. For so long a model chosen for its price is left only where that pays; 0: never "
        "asked. Needs price_cached_in.",
        ge=0,
    )
    max_waiting: int = Field(
        default=1000,
        description="Requests that wait for a place under max_concurrency, per model.",
        ge=0,
    )
    max_answer_bytes: Size = Field(
        default=64 << 20, description="Largest answer, or single event of a stream.", ge=1024
    )
    max_connections: int = Field(
        default=2048, description="Connections to providers at once.", ge=1
    )


class BudgetSection(Section):
    """A limit for everybody together, one tenant or one service type; those of a key belong to
    the key."""

    scope: str = Field(
        default="global",
        description="global, tenant:NAME or type:NAME (a service type).",
        pattern=r"^(global|(tenant|type):.{1,64})$",
    )
    unit: str = Field(default="dollars", description="dollars, tokens or requests.")
    limit: str = Field(description='How much, as text: "25" or "0.50".')
    period: str = Field(default="total", description="total, day or month (UTC).")

    @model_validator(mode="after")
    def _check(self) -> BudgetSection:
        budget_limit(self.unit, self.limit)
        if self.period not in PERIODS:
            raise ConfigError("period", self.period, f"one of {', '.join(PERIODS)}")
        return self


class KeysSection(Section):
    """Who may send prompts."""

    required: bool = Field(
        default=False,
        description="Refuse requests without a key of the proxy (intentctl prompts keys new). "
        "Must be true off loopback.",
    )


class RecordsSection(Section):
    """What is kept of answered requests: numbers and decisions, never prompts or answers."""

    max_rows: int = Field(
        default=200_000, description="Requests kept on disk; the oldest go first.", ge=0
    )
    recent: int = Field(
        default=5000, description="Requests kept in memory for GET /v1/requests/ID.", ge=1
    )


class ConversationsSection(Section):
    """Conversations the proxy keeps for clients that name one."""

    max_messages: int = Field(
        default=1000, description="Prompt-answer pairs kept of each; the oldest go first.", ge=1
    )
    max_bytes: Size = Field(
        default=64 << 20,
        description="Of each conversation, its images included; the oldest pairs go first.",
        ge=1,
    )
    max_age_s: Duration = Field(
        default=90 * 86400.0, description="Older pairs are forgotten; 0: none for its age.", ge=0
    )
    max_rows: int = Field(
        default=1_000_000, description="Pairs kept of all together; the oldest go first.", ge=1
    )
    wait_s: Duration = Field(
        default=300.0,
        description="Longest wait for the earlier requests of the same conversation.",
        gt=0,
    )


class StoreSection(Section):
    """Where keys, budgets, books and conversations are kept."""

    url: str = Field(
        default="",
        description="postgresql://USER@HOST/DATABASE for several proxies on one state (extra "
        "proxy-postgres), without a password. Empty: proxy.sqlite in the state directory.",
    )
    password_env: str = Field(
        default="", description="Environment variable that holds the database's password."
    )
    connections: int = Field(
        default=8, description="Connections to the database at once, beside three of its own.", ge=1
    )
    timeout_s: Duration = Field(
        default=5.0,
        description="Longest wait for the database; then the request gets 503.",
        gt=0,
    )
    lease_s: Duration = Field(
        default=15.0,
        description="A proxy not heard of for this long is taken for dead: its turns in "
        "conversations pass on, its open reservations are settled in full.",
        ge=1,
    )

    @model_validator(mode="after")
    def _check(self) -> StoreSection:
        check_database(self.url, self.password_env)
        return self


class RouterSection(Section):
    """The learned router of the service type `router`."""

    files: tuple[str, ...] = Field(
        default=(),
        description="Trained routers (intentctl prompts train routing), one a pair of models.",
    )
    names: dict[str, str] = Field(
        default={},
        description="The pool's name of a model by the name in the files, where they differ.",
    )


class LearnedSection(Section):
    """Decisions learned from recorded outcomes (intentctl prompts train), beside the router's."""

    cascade_file: str = Field(
        default="",
        description="When agreement of cheap models is not enough. Empty: when most disagree.",
    )
    context_file: str = Field(
        default="",
        description="How many messages the context filter `chooser` keeps. Empty: the last five.",
    )


class TracingSection(Section):
    """OpenTelemetry spans (extra proxy-otel)."""

    endpoint: str = Field(
        default="",
        description="Where spans go, OTLP over HTTP: http://HOST:4318/v1/traces. Empty: no spans.",
        pattern=r"^(https?://\S+)?$",
    )
    token_env: str = Field(
        default="", description="Environment variable with a bearer token for the endpoint."
    )
    sample: float = Field(
        default=1.0,
        description="Share of requests traced; a caller's own decision prevails.",
        ge=0,
        le=1,
    )


class BatchSection(Section):
    """Requests of many prompts by many models at once (/v1/batch)."""

    max_requests: int = Field(
        default=1000, description="Prompts times models of one batch, at most.", ge=1
    )
    concurrency: int = Field(
        default=8, description="Requests of one batch worked on at once, at most.", ge=1, le=1000
    )


class ProxyConfig(DaemonConfig):
    """Everything intentd-proxy reads from its file."""

    role: ClassVar[str] = "proxy"

    drain_timeout_s: Duration = Field(
        default=60.0,
        description="Longest wait for running requests after SIGTERM; new ones wait meanwhile, "
        "where the service manager holds the socket. What runs longer is broken off.",
        ge=0,
        le=600,
    )
    listen: ListenSection = Field(default=ListenSection(), description="The API.")
    models: tuple[ModelSection, ...] = Field(default=(), description="The model pool.")
    upstream: UpstreamSection = Field(default=UpstreamSection(), description="Calls to providers.")
    keys: KeysSection = Field(default=KeysSection(), description="API keys.")
    budgets: tuple[BudgetSection, ...] = Field(
        default=(), description="Budgets that bind all keys or a tenant's."
    )
    service_types: tuple[dict[str, Any], ...] = Field(
        default=(), description="Your own service types; see docs/prompts.md."
    )
    conversations: ConversationsSection = Field(
        default=ConversationsSection(), description="Conversations."
    )
    tracing: TracingSection = Field(default=TracingSection(), description="Spans.")
    router: RouterSection = Field(default=RouterSection(), description="The learned router.")
    learned: LearnedSection = Field(
        default=LearnedSection(), description="Other learned decisions."
    )
    batch: BatchSection = Field(default=BatchSection(), description="Batches.")
    cache: CacheSection = Field(default=CacheSection(), description="Stored answers.")
    records: RecordsSection = Field(default=RecordsSection(), description="The request log.")
    store: StoreSection = Field(
        default=StoreSection(), description="Where the state is; a change needs a restart."
    )

    @model_validator(mode="after")
    def _check(self) -> ProxyConfig:
        seen: set[str] = set()
        for index, model in enumerate(self.models):
            if model.name in seen:
                raise ConfigError(f"models[{index}].name", model.name, "a name used once")
            seen.add(model.name)
        for index, model in enumerate(self.models):
            for place, name in enumerate(model.fallbacks):
                if name not in seen or name == model.name:
                    raise ConfigError(
                        f"models[{index}].fallbacks[{place}]", name, "another model of the pool"
                    )
        types = offered_types(
            self.service_types,
            cached=self.cache.enabled,
            semantic=self.cache.semantic != "off",
            routed=bool(self.router.files),
        )
        if self.models:
            check_pool(types, self.service_types, seen)
        if self.cache.embedder_model and self.cache.embedder_model not in seen:
            raise ConfigError(
                "cache.embedder_model", self.cache.embedder_model, "a model of the pool"
            )
        if self.cache.keys_model not in ("", "rules", *seen):
            raise ConfigError(
                "cache.keys_model", self.cache.keys_model, "a model of the pool, or rules"
            )
        host, _ = split_address(self.listen.bind, "listen.bind")
        if not is_loopback(host) and not self.keys.required:
            raise ConfigError(
                "listen.bind", self.listen.bind, "a loopback address, or keys.required = true"
            )
        return self


def budget_limit(unit: str, limit: object) -> tuple[str, int]:
    """(ledger unit, integer limit) of a unit and limit as people write them. Raises InputError."""
    if unit in ("dollars", "nano_dollars"):
        return "nano_dollars", parse_dollars(limit, "limit")
    if unit not in UNITS:
        raise ConfigError("unit", unit, "dollars, tokens or requests")
    text = str(limit).strip()
    if not text.isdecimal() or len(text) > 18:
        raise ConfigError("limit", limit, f"a number of {unit} >= 0")
    return unit, int(text)
