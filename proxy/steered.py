"""A controller's policy over the configuration: thresholds, cooldowns and budgets, applied hot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from intentd.core.errors import InputError
from intentd.core.prompts.budgets import BudgetRule
from intentd.core.prompts.service_types import ModelStage, ServiceType
from intentd.core.prompts.steering import PromptsPolicy

NOTHING = PromptsPolicy({}, {})


def steered_types(
    types: Mapping[str, ServiceType], policy: PromptsPolicy
) -> dict[str, ServiceType]:
    """The service types with the policy's thresholds.

    A threshold for a strategy that the type no longer has is passed over, as is one for a type
    that this proxy does not offer: another proxy may.
    """
    made = dict(types)
    for name, (strategy, threshold) in policy.thresholds.items():
        one = made.get(name)
        stage = one.stage(ModelStage) if one is not None else None
        if one is not None and stage is not None and stage.strategy == strategy:
            made[name] = one.with_stage(replace(stage, threshold=threshold))
    return made


def budget_rules(policy: PromptsPolicy) -> dict[str, tuple[BudgetRule, ...]]:
    """The policy's budgets by scope. Raises InputError for what no budget can be.

    Scopes: global, tenant:NAME and type:NAME; budgets of keys are the keys' own.
    """
    rules: dict[str, tuple[BudgetRule, ...]] = {}
    for index, (scope, unit, limit, period) in enumerate(policy.budgets):
        if scope != "global" and not scope.startswith(("tenant:", "type:")):
            expected = "global, tenant:NAME or type:NAME"
            raise InputError(f"budgets[{index}].scope", scope, expected)
        rules[scope] = (*rules.get(scope, ()), BudgetRule(scope, unit, limit, period))
    return rules


def with_rules(
    own: Mapping[str, tuple[BudgetRule, ...]], policy: PromptsPolicy
) -> dict[str, tuple[BudgetRule, ...]]:
    """The operator's shared budgets and the policy's; of two for one account the lower binds."""
    merged = dict(own)
    for scope, rules in budget_rules(policy).items():
        kept = {(rule.unit, rule.period): rule for rule in merged.get(scope, ())}
        for rule in rules:
            key = (rule.unit, rule.period)
            known = kept.get(key)
            kept[key] = rule if known is None or rule.limit < known.limit else known
        merged[scope] = tuple(kept.values())
    return merged
