"""What the controller asks of the proxy for its console: the books by key and service type, the
models, and prompts tried in the playground.

A prompt of the playground is a request like any other: on the books, under the budgets, as the key
``console``, which nobody can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from intentd.core.errors import InputError, IntentdError
from intentd.core.prompts.request import PipelineError
from intentd.proxy import native
from intentd.proxy.answers import answer_document
from intentd.proxy.errors import ApiError, no_answer
from intentd.proxy.keys import CONSOLE
from intentd.proxy.server import Api

MAX_SPEND_ROWS: Final = 1000
MAX_ACCOUNTS: Final = 200
MAX_PROMPT: Final = 20_000
MAX_ANSWER: Final = 100_000


async def answer(
    api: Api, status: Mapping[str, Any], subject: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    """One question of the controller. Raises IntentdError."""
    if subject == "prompts.books":
        return await books(api, status, body)
    if subject in ("prompts.ask", "prompts.regenerate"):
        return await ask(api, subject, body)
    raise InputError("subject", f"{subject!r:.60}", "prompts.books, .ask or .regenerate")


async def books(api: Api, status: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """body: days. What was spent, what is left, which models and service types there are.

    ``books`` names what several proxies share, so that it is not counted twice."""
    days = body.get("days", 7)
    if type(days) is not int or not 1 <= days <= 366:
        raise InputError("days", f"{days!r:.40}", "1 to 366")
    rows = await api.ledger.spend(days)
    accounts = sorted(await api.ledger.accounts(), key=lambda account: account.account_id)
    return {
        "books": await api.ledger.identity(),
        "spend": rows[:MAX_SPEND_ROWS],
        "more_rows": max(0, len(rows) - MAX_SPEND_ROWS),
        "accounts": [
            {
                "account": account.account_id,
                "unit": account.unit,
                "limit": account.limit,
                "spent": account.spent,
                "reserved": account.reserved,
            }
            for account in accounts[:MAX_ACCOUNTS]
        ],
        "models": status.get("models", {}),
        "cache": status.get("cache"),
        "service_types": sorted(api.answers.types),
        "keys": len(api.keys),
    }


async def ask(api: Api, subject: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """body: as /v1/request or /v1/regenerate take it. The answer as the native API gives it."""
    exchange = api.exchange(CONSOLE)
    try:
        raw = orjson.dumps(dict(body))
        if subject == "prompts.ask":
            asked = native.read_request(raw)
            if len(asked.request.prompt) > MAX_PROMPT:
                size = len(asked.request.prompt)
                raise InputError("prompt", f"{size} characters", f"at most {MAX_PROMPT}")
            made = await api.answers.perform(asked, exchange)
        else:
            wanted = native.read_regenerate(raw)
            async with api.answers.again(wanted, exchange) as (asked, before):
                made = await api.answers.perform(asked, exchange, None, before)
    except PipelineError as error:
        raise IntentdError(str(no_answer(error))) from None
    except ApiError as error:
        exchange.outcome = exchange.outcome or error.outcome
        raise IntentdError(str(error)) from None
    except IntentdError:
        exchange.outcome = exchange.outcome or "invalid"
        raise
    finally:
        api.close(exchange)
    document = answer_document(made, exchange)
    document["response"] = document["response"][:MAX_ANSWER]
    return document
