"""Trained decisions beside the router's: agreement of cheap models, how much context to send."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intentd.core.errors import ConfigError, InputError
from intentd.core.prompts.cascade import PRIOR_AGREEMENT, AgreementModel
from intentd.core.prompts.context import Messages, with_chooser
from intentd.core.prompts.service_types import ContextStage, ServiceType
from intentd.proxy.config import LearnedSection

Choose = Callable[[str, Messages], int]


@dataclass(frozen=True, slots=True)
class Learned:
    """agreement: of the strategy agree. choose: of the filter chooser, None before learning."""

    agreement: AgreementModel = PRIOR_AGREEMENT
    choose: Choose | None = None

    def types(self, types: Mapping[str, ServiceType]) -> dict[str, ServiceType]:
        """The service types with their choosers deciding by what was learned."""
        made = dict(types)
        for name, one in types.items():
            stage = one.stage(ContextStage)
            if stage is not None:
                filters = with_chooser(stage.filters, self.choose)
                if filters != stage.filters:
                    made[name] = one.with_stage(replace(stage, filters=filters))
        return made


def load_learned(section: LearnedSection) -> Learned:
    """Read the files that are named; numpy is not imported before. Raises ConfigError."""
    learned = Learned()
    if section.cascade_file:
        model = _read(section.cascade_file, "learned.cascade_file", "cascade")
        learned = replace(learned, agreement=model.agreement)
    if section.context_file:
        chooser = _read(section.context_file, "learned.context_file", "context")

        def choose(prompt: str, messages: Messages) -> int:
            kept: int = chooser.choose(prompt, [f"{m.prompt} {m.response}" for m in messages])
            return kept

        learned = replace(learned, choose=choose)
    return learned


def _read(name: str, field: str, kind: str) -> Any:
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(field, name, f"a readable file ({error.strerror})") from None
    try:
        from intentd.core.prompts.modelfile import decode_model
    except ModuleNotFoundError:
        raise ConfigError(field, name, "numpy installed (intentd[evaluate])") from None
    try:
        return decode_model(data, kind=kind).model
    except InputError as error:
        raise ConfigError(field, name, f"a trained {kind} model ({error})") from None
