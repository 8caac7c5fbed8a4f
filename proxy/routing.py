"""The learned router from trained files; nothing of it is imported before a file is named."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from intentd.core.errors import ConfigError, InputError
from intentd.core.prompts.effects import (
    CacheFound,
    CallModel,
    ContextLoaded,
    Done,
    Foretell,
    LoadContext,
    LookupCache,
    Outcome,
    Prediction,
    Purpose,
    Reply,
    Together,
)
from intentd.core.prompts.models import ModelPool, ordered
from intentd.core.prompts.pipeline import run
from intentd.core.prompts.request import Env, PipelineError, Request
from intentd.core.prompts.service_types import ModelStage, ServiceType
from intentd.proxy.cache.available import missing_parts
from intentd.proxy.config import RouterSection

MAX_EFFECTS: Final = 64  # of a pipeline that is explained
REMEMBERED: Final = 1024
REMEMBERED_CHARS: Final = 4000


class Router(Protocol):
    """See core.prompts.router.LearnedRouter."""

    def predict(self, prompt: str, weak: str, strong: str) -> Prediction: ...


class Foreteller:
    """Asks a router in a thread of its own: embedding a long prompt takes tens of milliseconds,
    in which the loop would serve nobody. What was foretold lately is known."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._recent: OrderedDict[Foretell, Prediction] = OrderedDict()

    async def predict(self, asked: Foretell) -> Prediction:
        known = self._recent.get(asked)
        if known is not None:
            self._recent.move_to_end(asked)
            return known
        found = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._router.predict, asked.prompt, asked.weak, asked.strong
        )
        if len(asked.prompt) <= REMEMBERED_CHARS:
            self._recent[asked] = found
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True)
class Routing:
    """A router and where each pair of models was learned: weak, strong, labels, made, digest."""

    router: Router
    pairs: tuple[Mapping[str, Any], ...]


def load_routing(section: RouterSection, model_file: str) -> Routing | None:
    """Read the files and load the embedder; None when no file is named. It takes a second.

    Raises ConfigError naming the file and what is wrong.
    """
    if not section.files:
        return None
    if missing := missing_parts(model_file):
        raise ConfigError(
            "router.files", section.files[0], f"{', '.join(missing)} installed (intentd[evaluate])"
        )
    from intentd.core.prompts.modelfile import decode_model, load_router
    from intentd.proxy.minilm import MiniLM

    contents, pairs = [], []
    for index, name in enumerate(section.files):
        field = f"router.files[{index}]"
        try:
            data = Path(name).read_bytes()
            trained = decode_model(data, kind="router")
        except OSError as error:
            raise ConfigError(field, name, f"a readable file ({error.strerror})") from None
        except InputError as error:
            raise ConfigError(field, name, f"a trained router ({error})") from None
        model: Any = trained.model
        contents.append(data)
        pairs.append(
            {
                "file": name,
                "weak": section.names.get(model.weak, model.weak),
                "strong": section.names.get(model.strong, model.strong),
                "labels": model.labels,
                "made": dict(trained.made),
                "sha256": trained.digest,
            }
        )
    embedder = MiniLM(Path(model_file) if model_file else None)
    return Routing(load_router(contents, embedder.embed, section.names), tuple(pairs))


def explain_calls(prompt: str, made: ServiceType, pool: ModelPool) -> dict[str, Any]:
    """The calls of a prompt nobody is content with, in order: the real pipeline, driven with
    answers that are worth nothing."""
    stage: ModelStage = made.stage(ModelStage)
    steps = run(made, Request(prompt), Env(pool))
    calls: list[dict[str, str]] = []

    def answered(effect: CallModel) -> Reply:
        calls.append({"model": effect.model, "purpose": effect.purpose.value})
        # a verifier's worst score; texts that differ, so that compared ones do not agree
        verdict = "1" if effect.purpose is Purpose.VERIFY else f"answer {len(calls)}"
        return Reply(effect.model, verdict)

    try:
        effect = next(steps)
        for _ in range(MAX_EFFECTS):
            outcome: Outcome = Done()
            if isinstance(effect, CallModel):
                outcome = answered(effect)
            elif isinstance(effect, Together):
                asked = [one for one in effect.effects if isinstance(one, CallModel)]
                outcome = tuple(answered(one) for one in asked)
            elif isinstance(effect, LookupCache):
                outcome = CacheFound()
            elif isinstance(effect, LoadContext):
                outcome = ContextLoaded()
            effect = steps.send(outcome)
    except StopIteration:
        pass
    except PipelineError as error:
        raise InputError("service_type", made.name, f"one that can answer: {error}") from None
    finally:
        steps.close()
    if not calls:
        raise InputError("service_type", made.name, "one that asks a model")
    why = {
        "verify": f"the verifier scores the first answer; below {stage.threshold:g} the last is "
        "asked",
        "agree": "the first answers are compared; where they are likely wrong "
        f"({stage.threshold:g} and more) the last is asked",
        "fast": "a short answer now, a better one behind it",
    }.get(stage.strategy, "the first that answers of the candidates in their order")
    first = next(call["model"] for call in calls if call["purpose"] == Purpose.ANSWER.value)
    return {
        "service_type": made.name,
        "strategy": stage.strategy,
        "model": first,
        "calls": calls,
        "threshold": stage.threshold if stage.strategy in ("verify", "agree") else None,
        "why": why,
    }


def explain_route(
    prompt: str, made: ServiceType, pool: ModelPool, routing: Routing | None
) -> dict[str, Any]:
    """Which models a service type would ask for a prompt, and why; nothing is asked.

    Raises InputError when none can be asked.
    """
    stage: ModelStage = made.stage(ModelStage)
    if stage.strategy != "route":
        return explain_calls(prompt, made, pool)
    models = tuple(pool)
    allowed = tuple(m for m in models if not made.allowed or m.name in made.allowed)
    candidates = stage.models(allowed)
    if not candidates:
        raise InputError("service_type", made.name, "one with a model of the pool")
    strong = pool.get(stage.second) if stage.second else ordered("dearest")(candidates)[0]
    weak = pool.get(stage.first) if stage.first else ordered("cheapest")(candidates)[0]
    prediction = Prediction(0.0, known=False)
    if routing is not None and weak.name != strong.name:
        prediction = routing.router.predict(prompt, weak.name, strong.name)
    trained = [
        pair for pair in (routing.pairs if routing is not None else ())
        if (pair["weak"], pair["strong"]) == (weak.name, strong.name)
    ]  # fmt: skip
    asks_strong = prediction.gain > stage.threshold
    if not trained:
        why = "no router was trained for these two: neutral, the cheap one"
    elif not prediction.known:
        why = "the prompt is unlike all that was learned from: the mean gain counts"
    else:
        why = "the gain foretold for this prompt counts"
    return {
        "service_type": made.name,
        "strategy": stage.strategy,
        "model": strong.name if asks_strong else weak.name,
        "weak": weak.name,
        "strong": strong.name,
        "predicted_gain": round(prediction.gain, 4),
        "known": prediction.known,
        "threshold": stage.threshold,
        "why": why,
        "trained": trained,
        "candidates": [
            {"name": m.name, "price_in_nano": m.price.in_nano, "price_out_nano": m.price.out_nano}
            for m in candidates
        ],
    }
