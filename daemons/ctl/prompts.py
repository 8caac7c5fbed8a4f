"""intentctl prompts: keys, spend and models of the proxy on this machine."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

import typer

from intentd.core.errors import InputError
from intentd.core.prompts.money import format_dollars
from intentd.core.units import parse_duration_s
from intentd.daemons.ctl import prompts_cache, prompts_evaluate, prompts_train
from intentd.daemons.ctl.output import JsonOption, message, print_json, print_table
from intentd.daemons.ctl.reach import admin_client

app = typer.Typer(help="The language-model proxy: keys, spend, models.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys of the proxy.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(prompts_cache.app, name="cache")
app.add_typer(prompts_evaluate.app, name="evaluate")
app.add_typer(prompts_train.app, name="train")

NameArgument = Annotated[str, typer.Argument(help="Name of the key.")]
ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", help="Only this model (repeat for more).")
]
TypesOption = Annotated[
    list[str] | None,
    typer.Option("--service-type", help="Only this service type (repeat for more)."),
]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="A limit in total, /day or /month: dollars (5, 0.50/day), 20000tokens/day, "
        "100requests/month. Repeat for more.",
    ),
]
RateOption = Annotated[
    str, typer.Option("--rate", help="Requests a second, and burst: 2 or 0.5/10.")
]


LIFTED: Final = {
    "model": "models",
    "service-type": "service_types",
    "budget": "budgets",
    "rate": "rate",
    "expires": "expires_wall_s",
}


@keys_app.command("list")
def list_keys(as_json: JsonOption = False) -> None:
    """Every key, without its secret."""
    page = admin_client("proxy").call("keys")
    if as_json:
        print_json(page)
        return
    print_table(
        ("name", "tenant", "models", "service types", "budgets", "rate", "state"),
        [
            (
                key["name"],
                key["tenant"],
                ", ".join(key["models"]) or "all",
                ", ".join(key["service_types"]) or "all",
                ", ".join(_budget_text(rule) for rule in key["budgets"]) or "-",
                f"{key['rate']['per_second']:g}/s" if key["rate"] else "-",
                _key_state(key, time.time()),
            )
            for key in page["keys"]
        ],
    )


@keys_app.command("new")
def new_key(
    name: NameArgument,
    tenant: Annotated[str, typer.Option(help="Whose budgets it shares.")] = "default",
    models: ModelsOption = None,
    service_types: TypesOption = None,
    budgets: BudgetOption = None,
    rate: RateOption = "",
    expires: Annotated[str, typer.Option(help="Valid for so long, such as 720h.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key. Its secret is printed now and never again."""
    args: dict[str, Any] = {
        "name": name,
        "tenant": tenant,
        "grants": _grants(models, service_types, budgets, rate),
    }
    if expires:
        args["expires_wall_s"] = time.time() + parse_duration_s(expires, "expires")
    made = admin_client("proxy").call("keys.new", **args)
    if as_json:
        print_json(made)
        return
    message(f"key {name}: keep it now, only its hash is stored")
    print(made["secret"])


@keys_app.command("change")
def change_key(
    name: NameArgument,
    models: ModelsOption = None,
    service_types: TypesOption = None,
    budgets: BudgetOption = None,
    rate: RateOption = "",
    tenant: Annotated[str, typer.Option(help="Whose budgets it shares.")] = "",
    expires: Annotated[str, typer.Option(help="Valid for so long from now, such as 720h.")] = "",
    lift: Annotated[
        list[str] | None,
        typer.Option("--lift", help=f"No limit any more: {', '.join(LIFTED)} (repeat for more)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Replace what is named, keep the rest; what was spent stays spent."""
    args: dict[str, Any] = {"grants": _grants(models, service_types, budgets, rate)}
    for limit in lift or ():
        if limit not in LIFTED:
            raise InputError("--lift", limit, f"one of {', '.join(LIFTED)}")
        field = LIFTED[limit]
        if field in args["grants"] or (limit == "expires" and expires):
            raise InputError("--lift", limit, "a limit that is not set by the same command")
        if limit == "expires":
            args[field] = None
        else:
            args["grants"][field] = None if limit == "rate" else []
    if tenant:
        args["tenant"] = tenant
    if expires:
        args["expires_wall_s"] = time.time() + parse_duration_s(expires, "expires")
    if args == {"grants": {}}:
        raise InputError("options", "none", "something to change")
    changed = admin_client("proxy").call("keys.change", name=name, **args)
    if as_json:
        print_json(changed)
    else:
        message(f"key {name}: changed")


@keys_app.command("revoke")
def revoke_key(name: NameArgument, as_json: JsonOption = False) -> None:
    """Refuse a key from now on."""
    revoked = admin_client("proxy").call("keys.revoke", name=name)
    if as_json:
        print_json(revoked)
    else:
        message(f"key {name}: revoked")


@app.command("spend")
def spend(
    days: Annotated[int, typer.Option(help="Days to show, today included.")] = 30,
    by: Annotated[str, typer.Option(help="Sum by key, model, tenant, service_type or day.")] = "",
    as_json: JsonOption = False,
) -> None:
    """What was spent, and what budgets have left."""
    page = admin_client("proxy").call("spend", days=days)
    columns = ("day", "key", "tenant", "model", "service_type")
    if by and by not in columns:
        raise InputError("by", by, f"one of {', '.join(columns)}")
    rows = _sum_by(page["rows"], by) if by else page["rows"]
    if as_json:
        print_json({**page, "rows": rows})
        return
    shown = (by,) if by else columns
    print_table(
        (*shown, "calls", "failed", "in tokens", "out tokens", "cost", "of it estimated"),
        [
            (
                *(row[name] for name in shown),
                row["requests"],
                row["failed"],
                row["in_tokens"],
                row["out_tokens"],
                format_dollars(row["cost_nano"]),
                format_dollars(row["estimated_nano"]),
            )
            for row in rows
        ],
    )
    if page["accounts"]:
        print_table(
            ("budget", "limit", "spent", "reserved", "left"),
            [
                (
                    row["account"],
                    *(
                        _amount_text(row["unit"], row[name])
                        for name in ("limit", "spent", "reserved", "left")
                    ),
                )
                for row in page["accounts"]
            ],
            title="budgets",
        )


@app.command("models")
def models(as_json: JsonOption = False) -> None:
    """The pool: prices, health, calls under way."""
    page = admin_client("proxy").call("models")
    if as_json:
        print_json(page)
        return
    print_table(
        ("model", "state", "calls", "$/M in", "$/M out", "window", "fallbacks", "at"),
        [
            (
                row["name"],
                row["state"] + (f" ({row['reason']})" if row["reason"] else ""),
                row["calls"],
                row["price_in"],
                row["price_out"],
                row["window"] or "?",
                ", ".join(row["fallbacks"]) or "-",
                row["base_url"],
            )
            for row in page["models"]
        ],
    )


@app.command("route")
def route(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    service_type: Annotated[
        str, typer.Option(help="A service type; by default the learned router's.")
    ] = "router",
    explain: Annotated[bool, typer.Option("--explain", help="Say why.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which models a prompt would go to, and why; none is asked."""
    page = admin_client("proxy").call("route", prompt=prompt, service_type=service_type)
    if as_json:
        print_json(page)
        return
    print(page["model"])
    if explain and "calls" in page:
        for call in page["calls"]:
            message(f"{call['purpose']}: {call['model']}")
        message(page["why"])
    elif explain:
        message(
            f"{page['strong']} over {page['weak']}: gain {page['predicted_gain']:+.3f}, "
            f"asked for above {page['threshold']:g}"
        )
        message(page["why"])
        for pair in page["trained"]:
            message(f"learned from {pair['labels']} prompts, {pair['file']}")


def _key_state(key: dict[str, Any], now_s: float) -> str:
    if key["revoked"]:
        return "revoked"
    if key["expires_wall_s"] is None:
        return "valid"
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(key["expires_wall_s"]))
    return f"expired {until}" if key["expires_wall_s"] <= now_s else f"valid until {until}"


def _grants(
    models: list[str] | None,
    service_types: list[str] | None,
    budgets: list[str] | None,
    rate: str,
) -> dict[str, Any]:
    grants: dict[str, Any] = {}
    if models:
        grants["models"] = models
    if service_types:
        grants["service_types"] = service_types
    if budgets:
        grants["budgets"] = [parse_budget(text) for text in budgets]
    if rate:
        grants["rate"] = _rate(rate)
    return grants


def parse_budget(text: str) -> dict[str, str]:
    """``5``, ``0.50/day``, ``20000tokens/month``, ``100requests`` as the daemon reads it."""
    amount, slash, period = text.partition("/")
    unit = "dollars"
    for name in ("tokens", "requests"):
        if amount.endswith(name):
            unit, amount = name, amount.removesuffix(name)
    if slash and period not in ("day", "month", "total"):
        raise InputError("budget", text, "day, month or total after the slash")
    return {"unit": unit, "limit": amount.strip(), "period": period or "total"}


def _rate(text: str) -> dict[str, float]:
    per_second, slash, burst = text.partition("/")
    try:
        rate = float(per_second)
        return {"per_second": rate, "burst": float(burst) if slash else max(1.0, rate)}
    except ValueError:
        raise InputError("rate", text, "requests a second, such as 2 or 0.5/10") from None


def _budget_text(rule: dict[str, Any]) -> str:
    return f"{_amount_text(rule['unit'], rule['limit'])}/{rule['period']}"


def _amount_text(unit: str, amount: int) -> str:
    return format_dollars(amount) if unit == "nano_dollars" else f"{amount} {unit}"


def _sum_by(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = sums.setdefault(row[column], {column: row[column]})
        for name, value in row.items():
            if isinstance(value, int):
                known[name] = known.get(name, 0) + value
    return list(sums.values())
