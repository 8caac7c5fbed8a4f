"""intentd-proxy: language-model prompts for less (dissertation, chapter 4)."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from aiohttp import web

from intentd import __version__
from intentd.core.errors import ConfigError, InputError, IntentdError
from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.core.prompts.budgets import BudgetRule, period_name
from intentd.core.prompts.health import HealthState
from intentd.core.prompts.models import ModelPool
from intentd.core.prompts.money import format_dollars
from intentd.core.prompts.service_types import ServiceType, get_type
from intentd.core.prompts.steering import PromptsPolicy, policy_from_plain
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.config import split_address
from intentd.daemons.kit.lifecycle import Daemon, Kit, run_daemon
from intentd.daemons.kit.link import MemberLink
from intentd.daemons.kit.store import StoreError
from intentd.proxy import questions
from intentd.proxy.adapter import litellm
from intentd.proxy.adapter.http import Connections
from intentd.proxy.adapter.litellm import LitellmUpstream
from intentd.proxy.adapter.native import Upstream, open_session
from intentd.proxy.cache.admin import cache_admin
from intentd.proxy.cache.part import CachePart
from intentd.proxy.call import Exchange, models_named
from intentd.proxy.config import ProxyConfig, budget_limit
from intentd.proxy.driver import Driver
from intentd.proxy.engine import Engine
from intentd.proxy.errors import ApiError
from intentd.proxy.feedback import FeedbackBook
from intentd.proxy.handover import Server
from intentd.proxy.keys import CACHE_KEY, Keys
from intentd.proxy.learned import load_learned
from intentd.proxy.metrics import ProxyMetrics
from intentd.proxy.routing import Foreteller, Routing, explain_route, load_routing
from intentd.proxy.server import Api
from intentd.proxy.service import FIXED, offered_types
from intentd.proxy.state import open_state
from intentd.proxy.steered import NOTHING, budget_rules, steered_types, with_rules
from intentd.proxy.store.base import State
from intentd.proxy.tracing import Tracing

_log = logging.getLogger(__name__)

LOCK_FILE: Final = "proxy.lock"
LISTENER: Final = "api"  # names of descriptors that outlive the process
CONNECTIONS: Final = "api-connection"
BACKLOG: Final = 4096  # connections that wait in the kernel while a restart lasts
GC_THRESHOLD: Final = 20_000
MAX_SPEND_DAYS: Final = 3660


class ProxyDaemon(Daemon[ProxyConfig]):
    """One process that owns its database and its port."""

    role: ClassVar[str] = "proxy"
    config_model = ProxyConfig
    audited: ClassVar[frozenset[str]] = frozenset(
        {"keys.new", "keys.change", "keys.revoke", "cache.put", "cache.delete"}
    )
    fixed: ClassVar[tuple[str, ...]] = (
        "listen",
        "tracing",
        "store",
        "upstream.max_connections",
        "upstream.connect_timeout_s",
        "cache.enabled",
        "cache.semantic",
        "cache.embedder_model",
        "cache.model_file",
        "cache.search",
        "cache.gate_file",
        "controller.enabled",
    )

    def __init__(self, config: ProxyConfig, kit: Kit) -> None:
        super().__init__(config, kit)
        self.address = ""
        self.api: Api | None = None
        self._state: State | None = None
        self._session: Connections | None = None
        self._runner: web.ServerRunner | None = None
        self._server: Server | None = None
        self._site: web.SockSite | None = None
        self._link: MemberLink | None = None
        self._cache: CachePart | None = None
        self._lock: int | None = None
        self._routing: Routing | None = None
        self._own: tuple[dict[str, ServiceType], dict[str, tuple[BudgetRule, ...]]] = ({}, {})
        self._steering = NOTHING

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        config, kit = self.config, self.kit
        self._lock = lock_state(config.state_dir)
        state = self._state = await open_state(config, kit.clock, kit.boot)
        keys = Keys(state.key_table, kit.clock)
        await keys.load()
        metrics = ProxyMetrics(self._gauges)
        kit.metrics.registry.register(metrics)
        self._session = open_session(config.upstream)
        engine = Engine(config.upstream, state.books, metrics, kit.clock, kit.rng)
        self.api = Api(
            config,
            engine,
            keys,
            state,
            metrics,
            kit.metrics,
            kit.clock,
            Driver(engine, state.turns),
            FeedbackBook(state.feedback_rows, kit.clock, metrics.feedback),
        )
        if config.cache.enabled:
            self._cache = self._cache_part(config, state, self.api)
        await load_litellm(config)
        self._prepare(config, await self._load_routing(config))()
        if config.tracing.endpoint:
            self.api.tracing = Tracing(config.tracing, config.name, __version__)
        tasks.create_task(self._watch_prices(), name="prices")
        await state.start(tasks, keys.load)
        if self._cache is not None:
            await self._cache.start(tasks)
        await self._listen(self.api)
        if config.controller.enabled:
            self._link = MemberLink(
                config,
                kit,
                on_policy=self._on_policy,
                collect_report=lambda: {"prompts": self._report()},
                capabilities=lambda: {"api": self.address},
                on_question=self._on_question,
            )
            await self._link.start(tasks)
        _log.info("serving", extra={"api": self.address, "models": len(config.models)})

    async def reload(self, config: ProxyConfig) -> None:
        """Models, budgets, service types, the router and bounds."""
        await load_litellm(config)
        swap = self._prepare(config, await self._load_routing(config))
        if self._link is not None:
            self._link.reconfigure(config.controller)
        swap()
        if self._cache is not None:
            self._cache.reload(config.cache)

    async def drain(self, deadline_s: float) -> None:
        """No new connections, and what runs is finished. Where the manager holds descriptors, the
        next process gets the connections; else requests on open ones get 503."""
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()
        api, server = self.api, self._server
        if api is None:
            return
        if server is None or not self.kit.held.capacity:
            api.draining = True
        else:
            handed = await server.hand_over(self.kit.held, CONNECTIONS)
            _log.info("handed on", extra={"connections": handed})
        await api.idle.wait()

    async def set_aside(self) -> None:
        """Connections are refused, also by the kernel, which would keep them for the next process;
        requests on open ones get 503 and "Connection: close"."""
        assert self.api is not None, "before start"
        self.api.draining = True
        if self._site is not None:
            site, self._site = self._site, None
            self.kit.held.drop(LISTENER)
            await site.stop()

    def work_left(self) -> dict[str, int]:
        return {"requests": self.api.active} if self.api is not None else {}

    async def take_up(self) -> None:
        assert self.api is not None, "before start"
        if self._site is None:
            await self._open(self.address)
        self.api.draining = False

    async def stop(self) -> None:
        if self.api is not None and self.api.tracing is not None:
            tracing, self.api.tracing = self.api.tracing, None
            await asyncio.to_thread(tracing.close)
        if self._link is not None:
            await self._link.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()
        if self._cache is not None:
            await self._cache.cache.close()
        if self._state is not None:
            await self._state.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def unready(self) -> list[str]:
        reasons = self._link.unready() if self._link is not None else []
        if self._state is not None:
            reasons = [*reasons, *self._state.unready()]
        api = self.api
        if api is not None:
            if not api.engine.models:
                reasons = [*reasons, "no models configured"]
            elif all(
                model.health.state is HealthState.OPEN for model in api.engine.models.values()
            ):
                reasons = [*reasons, "every model cools down"]
        return reasons

    def status(self) -> dict[str, Any]:
        api = self.api
        if api is None:
            return {}
        now = self.kit.clock.now()
        return {
            "api": self.address,
            "active": api.active,
            "keys": len(api.keys),
            "models": {
                model.name: {
                    "state": model.health.state.value,
                    "reason": model.health.reason,
                    "wait_s": round(model.health.wait_s(now), 3),
                    "calls": model.places.taken,
                }
                for model in api.engine.models.values()
            },
            "cache": self._cache.status() if self._cache is not None else None,
            "ledger": {
                "open_reservations": api.ledger.open_reservations,
                "recovered": api.ledger.recovered,
                "write_failures": api.ledger.write_failures,
                "dropped_records": api.ledger.dropped_records,
            },
        }

    async def admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        api = self.api
        if api is None:
            raise AdminRefusedError("the proxy is starting", "starting")
        try:
            match command:
                case "keys":
                    return {"keys": [key.to_plain() for key in api.keys.all()]}
                case "keys.new":
                    key, secret = await api.keys.new(
                        _text(args, "name"),
                        str(args.get("tenant", "default")),
                        _offered(api, _grants(args)),
                        _expiry(args),
                    )
                    return {"key": key.to_plain(), "secret": secret}
                case "keys.change":
                    more = {name: args[name] for name in ("tenant",) if name in args}
                    if "expires_wall_s" in args:
                        more["expires_wall_s"] = _expiry(args)
                    key = await api.keys.change(
                        _text(args, "name"), _offered(api, _grants(args)), **more
                    )
                    return {"key": key.to_plain()}
                case "keys.revoke":
                    return {"key": (await api.keys.revoke(_text(args, "name"))).to_plain()}
                case "spend":
                    days = args.get("days", 30)
                    if type(days) is not int or not 1 <= days <= MAX_SPEND_DAYS:
                        raise InputError("days", days, f"1 to {MAX_SPEND_DAYS}")
                    return await self._spend(api, days)
                case "explain":
                    wanted = _text(args, "id")
                    document = await api.log.find_any(wanted)
                    if document is None:
                        raise InputError("id", wanted[:80], "a request this proxy remembers")
                    return {"request": wanted, **document}
                case "models":
                    return {"models": self._models(api)}
                case "route":
                    return await self._route(api, args)
            if command.startswith("cache.") and api.cache_api is not None:
                return await cache_admin(api.cache_api, self._cache, api.keys, command, args)
        except ApiError as error:
            raise AdminRefusedError(str(error), "refused") from None
        except InputError as error:
            raise AdminRefusedError(str(error), "bad_request") from None
        except StoreError as error:
            raise AdminRefusedError(str(error), "store") from None
        return await super().admin(command, args)

    async def prove(self) -> list[Claim]:
        """The ledger equals the receipts."""
        return [] if self._state is None else await self._state.prove()

    # -- inside --------------------------------------------------------------------------------

    async def _load_routing(self, config: ProxyConfig) -> Routing | None:
        """Raises ConfigError."""
        return await asyncio.to_thread(load_routing, config.router, config.cache.model_file)

    def _prepare(self, config: ProxyConfig, routing: Routing | None) -> Callable[[], None]:
        """Build everything of a configuration; calling the result swaps. Raises ConfigError."""
        api, session, state, cache = self.api, self._session, self._state, self._cache
        assert api is not None, "before start"
        assert session is not None, "before start"
        assert state is not None, "before start"
        learned = load_learned(config.learned)
        upstreams = self._upstreams(config, session)
        shared: dict[str, list[BudgetRule]] = defaultdict(list)
        for budget in config.budgets:
            unit, limit = budget_limit(budget.unit, budget.limit)
            shared[budget.scope].append(BudgetRule(budget.scope, unit, limit, budget.period))
        own_rules = {scope: tuple(rules) for scope, rules in shared.items()}
        types = offered_types(
            config.service_types,
            cached=cache is not None,
            semantic=cache is not None and cache.cache.has_semantic,
            routed=routing is not None,
        )
        own_types = learned.types(types)
        steered_types(own_types, self._steering)
        with_rules(own_rules, self._steering)
        pool = self._pool(config)

        def swap() -> None:
            api.engine.set_pool(upstreams, config.upstream)
            api.driver.pool = pool
            state.reload(config)
            self._routing = routing
            api.driver.foreteller = Foreteller(routing.router) if routing is not None else None
            api.driver.warmth.keep_s = config.upstream.prompt_cache_s
            api.driver.agreement = learned.agreement
            api.log.most = api.answers.memory.most = config.records.recent
            api.config = config
            self._own = (own_types, own_rules)
            self._steer(api, self._steering)

        return swap

    def _upstreams(
        self, config: ProxyConfig, session: Connections
    ) -> dict[str, Upstream | LitellmUpstream]:
        """Who is asked for each model, with its key. Raises ConfigError."""
        upstreams: dict[str, Upstream | LitellmUpstream] = {}
        for index, model in enumerate(config.models):
            secret = ""
            if model.api_key_env:
                secret = os.environ.get(model.api_key_env, "")
                if not secret or not secret.isascii() or not secret.isprintable():
                    raise ConfigError(
                        f"models[{index}].api_key_env",
                        model.api_key_env,
                        "an environment variable that holds the provider's key",
                    )
            upstreams[model.name] = (
                LitellmUpstream(model, config.upstream, secret, self.kit.clock)
                if model.provider == "litellm"
                else Upstream(model, config.upstream, session, secret, self.kit.clock)
            )
        return upstreams

    def _cache_part(self, config: ProxyConfig, state: State, api: Api) -> CachePart:
        clock, driver = self.kit.clock, api.driver

        async def embed(model: str, texts: Sequence[str], by: Exchange | None) -> list[list[float]]:
            if by is not None:
                return await driver.embed(model, texts, by)
            own = api.exchange(CACHE_KEY)
            own.service_type = own.path = "cache"
            try:
                return await driver.embed(model, texts, own)
            finally:
                if own.steps:
                    api.receipt(own)

        part = CachePart(
            config.cache, state.cache_rows, clock, driver, lambda: api.active, embed
        )  # fmt: skip
        self.kit.metrics.registry.register(part.cache.metrics)
        api.set_cache(part)
        return part

    def _pool(self, config: ProxyConfig) -> ModelPool:
        """The models as pipelines choose among them, by today's prices."""
        day = period_name("day", self.kit.clock.wall())
        return ModelPool(model.spec(day) for model in config.models)

    async def _watch_prices(self) -> None:
        """New prices hold from midnight (UTC) of their day."""
        while True:
            left_s = 86400 - self.kit.clock.wall() % 86400
            await self.kit.clock.sleep(min(left_s + 0.1, 3600.0))
            if self.api is not None:
                self.api.driver.pool = self._pool(self.config)

    async def _listen(self, api: Api) -> None:
        held = self.kit.held
        self._server = server = api.server()
        self._runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        await self._open(self.config.listen.bind)
        if received := held.take(CONNECTIONS):
            adopted = await server.adopt(received)
            held.drop(CONNECTIONS)  # a client has to see the end of its connection
            _log.info("taken over", extra={"connections": adopted})
        host, port = self._runner.addresses[0][:2]
        self.address = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"

    async def _open(self, bind: str) -> None:
        """The listening socket, that of the process before if it is there."""
        assert self._runner is not None, "before start"
        host, port = split_address(bind, "listen.bind")
        try:
            listener = self.kit.held.listen(LISTENER, host, port, backlog=BACKLOG)
            self._site = site = web.SockSite(self._runner, listener, backlog=BACKLOG)
            await site.start()
        except OSError as error:
            reason = (
                "in use by another process"
                if error.errno == errno.EADDRINUSE
                else error.strerror or str(error)
            )
            raise IntentdError(f"listen.bind: {bind} is not available: {reason}") from None

    def _gauges(self) -> dict[str, Any]:
        api = self.api
        if api is None:
            return {}
        models = api.engine.models.values()
        return {
            "active_requests": api.active,
            "open_reservations": api.ledger.open_reservations,
            "dropped_records": api.ledger.dropped_records,
            "model_available": {
                model.name: float(model.health.state is not HealthState.OPEN) for model in models
            },
            "model_calls": {model.name: model.places.taken for model in models},
        }

    async def _route(self, api: Api, args: dict[str, Any]) -> dict[str, Any]:
        wanted = args.get("service_type") or "router"
        if wanted == "router" and self._routing is None:
            raise InputError("router.files", "()", "a trained router, or another service type")
        made = get_type(api.answers.types, wanted)
        prompt, pool = _text(args, "prompt"), api.driver.pool
        return await asyncio.to_thread(explain_route, prompt, made, pool, self._routing)

    def _models(self, api: Api) -> list[dict[str, Any]]:
        status = self.status()["models"]
        return [
            {
                "name": model.name,
                "base_url": model.upstream.model.base_url or model.upstream.model.provider,
                "price_in": format_dollars(model.upstream.price.in_nano).removeprefix("$"),
                "price_out": format_dollars(model.upstream.price.out_nano).removeprefix("$"),
                "price_since": model.upstream.price.since,
                "capabilities": list(model.upstream.model.capabilities),
                "window": model.upstream.model.window,
                "fallbacks": list(model.upstream.model.fallbacks),
                **status[model.name],
            }
            for model in api.engine.models.values()
        ]

    async def _spend(self, api: Api, days: int) -> dict[str, Any]:
        return {
            "rows": await api.ledger.spend(days),
            "accounts": [
                {
                    "account": account.account_id,
                    "unit": account.unit,
                    "limit": account.limit,
                    "spent": account.spent,
                    "reserved": account.reserved,
                    "left": account.left,
                }
                for account in await api.ledger.accounts()
            ],
        }

    def _report(self) -> dict[str, Any]:
        """What the controller hears: sums since boot, by service type and model."""
        return self.api.outcomes.report() if self.api is not None else {}

    async def _on_question(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        if self.api is None:
            raise IntentdError("the proxy is starting")
        return await questions.answer(self.api, self.status(), subject, body)

    def _on_policy(self, policy: NumberedPolicy) -> PolicyAck:
        """Apply a policy of the prompts application, whole or not at all. Raises InputError."""
        if policy.application != "prompts":
            return PolicyAck(
                policy.application, policy.era, policy.number, applied=False,
                reason="a proxy takes policies of prompts",
            )  # fmt: skip
        wanted = policy_from_plain(policy.body)
        budget_rules(wanted)
        if self.api is not None:
            self._steer(self.api, wanted)
            self.api.answers.policy = [policy.era, policy.number]
        self._steering = wanted
        return PolicyAck(policy.application, policy.era, policy.number, applied=True)

    def _steer(self, api: Api, policy: PromptsPolicy) -> None:
        """Thresholds, budgets and cooldowns of a policy over those of the configuration."""
        types, rules = self._own
        api.answers.types = steered_types(types, policy)
        api.outcomes.types = api.answers.types
        if self._cache is not None:
            self._cache.prefetcher.types = api.answers.types
        api.engine.shared_budgets = with_rules(rules, policy)
        for model in api.engine.models.values():
            model.health.cooldown_s = policy.cooldowns_s.get(
                model.name, api.config.upstream.cooldown_s
            )


async def load_litellm(config: ProxyConfig) -> None:
    """Import it where a model needs it, outside the loop. Raises ConfigError when it is missing."""
    for index, model in enumerate(config.models):
        if model.provider == "litellm":
            try:
                await asyncio.to_thread(litellm.load)
            except ImportError:
                raise ConfigError(
                    f"models[{index}].provider",
                    "litellm",
                    "that library installed (pip install 'intentd[proxy-litellm]')",
                ) from None
            return


def lock_state(state_dir: Path) -> int:
    """Two proxies on one ledger would each count alone. Raises IntentdError."""
    path = state_dir / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise IntentdError(f"state_dir: cannot open {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise IntentdError(f"state_dir: {state_dir} is in use by another proxy") from None
    return descriptor


def _text(args: dict[str, Any], field: str) -> str:
    value = args.get(field)
    if not isinstance(value, str):
        raise InputError(field, value, "text")
    return value


def _grants(args: dict[str, Any]) -> dict[str, Any]:
    value = args.get("grants", {})
    if not isinstance(value, dict):
        raise InputError("grants", value, "an object")
    return value


def _offered(api: Api, grants: dict[str, Any]) -> dict[str, Any]:
    """Grants that this proxy can give. Raises InputError for a model or type it has not."""
    for field, known in (
        ("models", api.engine.models.keys()),
        ("service_types", api.answers.types.keys() | {FIXED}),
    ):
        names = grants.get(field)
        for name in names if isinstance(names, (list, tuple)) else ():
            if isinstance(name, str) and name not in known:
                raise InputError(field, name[:128], f"of {models_named(known)}")
    return grants


def _expiry(args: dict[str, Any]) -> float | None:
    value = args.get("expires_wall_s")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InputError("expires_wall_s", value, "seconds since 1970")
    return float(value)


def main() -> int:
    # A request makes some hundred short-lived objects and no cycles: collect rarely.
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    return run_daemon(ProxyDaemon)


if __name__ == "__main__":
    raise SystemExit(main())
