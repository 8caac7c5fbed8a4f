"""Random bodies at every door of the proxy: each gets one OpenAI-shaped error or an answer.

``python -m benchmarks.fuzz_proxy --bodies 100000 --json``. A real daemon over real sockets, keys
required, a provider behind it that always answers. Bodies: random bytes, valid ones cut, with bits
flipped, with a node anywhere replaced by nonsense, with fields that are not the client's to set,
too deep, too large; wrong keys, headers, methods and paths. Wrong is: a status over 499, an error
of another shape, a refusal that names no field, a stack trace or a planted secret in an answer or
in the log, a daemon that does not answer afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.proxy_process import ProxyProcess, progress

PROVIDER_SECRET = "provider-secret-7b1f"
PROMPT_MARK = "prompt-mark-93ac"  # the log must not hold prompts either
WORKERS = 16
NAMED = re.compile(
    r".{1,80}: got |.{1,80}: \d+ bytes|the body |no such path|this API key|expected Auth", re.DOTALL
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": [{"type": "text", "text": PROMPT_MARK}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "user", "content": "and?"},
    ],
    "tools": [TOOL],
    "max_tokens": 20,
    "temperature": 0.5,
    "intentd": {"service_type": "cost", "options": {"context": [{"last_k": 2}]}},
}  # fmt: skip
SEEDS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": [PROMPT_MARK, "x"], "n": 1, "max_tokens": 5},
    "/v1/embeddings": {"model": "m", "input": [PROMPT_MARK, "x"]},
    "/v1/responses": {
        "model": "m", "input": [
            {"role": "user", "content": [{"type": "input_text", "text": PROMPT_MARK}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "3"}],
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "text": {"format": {"type": "json_object"}}, "max_output_tokens": 9, "store": True,
    },
    "/v1/messages": {
        "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "Be kind"}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT_MARK}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
    },
    "/v1/messages/count_tokens": {
        "model": "m", "messages": [{"role": "user", "content": PROMPT_MARK}],
    },
    "/v1/request": {
        "prompt": PROMPT_MARK, "service_type": "model_selector", "conversation": "c1",
        "options": {"threshold": 7}, "params": {"temperature": 0},
    },
    "/v1/regenerate": {"id": "req_x", "service_type": "quality", "options": {}},
    "/v1/batch": {"prompts": [PROMPT_MARK, {"prompt": "x"}], "models": ["m"], "max_tokens": 3},
    "/v1/feedback": {"id": "req_x", "rating": "good", "comment": "well"},
}  # fmt: skip
NONSENSE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1e308, -0.5, "", "x", "m", "fixed",
    "é\ud7ff", "\x00", "a" * 5000, [], {}, [[]], [None], {"": None}, {"type": None},
    {"type": "text"}, {"role": "user"}, ["m"] * 50, {"$ref": "#"},
    "../../etc/passwd", "resp_" + "0" * 24 + "_x",
)  # fmt: skip
FOREIGN = (
    "api_base", "base_url", "api_key", "extra_headers", "custom_llm_provider", "api_version",
    "__class__", "service_type", "intentd", "n", "logprobs", "stream_options",
)  # fmt: skip


ELSEWHERE = (
    "/v1/requests/%00", "/v1/conversations/a%20b", "/v1/conversations?limit=x",
    "/v1/responses/resp_x", "/v1/models/none", "/", "/v1", "/openapi.json",
)  # fmt: skip


def replaced(body: Any, rng: random.Random) -> Any:
    """The body with one node, anywhere, replaced, removed or doubled."""
    whole = {"body": copy.deepcopy(body)}
    places: list[tuple[Any, Any]] = []
    stack: list[Any] = [whole]
    while stack:
        inner = stack.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                stack.append(inner[key])
    holder, key = rng.choice(places[1:] or places)
    if rng.random() < 0.15:
        del holder[key]
    elif rng.random() < 0.1 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[key] = copy.deepcopy(rng.choice(NONSENSE))
    return whole.get("body", {})


def make_body(path: str, rng: random.Random) -> tuple[str, bytes]:
    """(kind, body)."""
    seed = SEEDS[path]
    raw = json.dumps(seed).encode()
    kind = rng.choices(
        ("replaced", "twice", "bytes", "cut", "flipped", "foreign", "deep", "large"),
        (40, 20, 8, 8, 10, 8, 4, 2),
    )[0]
    if kind == "bytes":
        return kind, rng.randbytes(rng.randrange(200))
    if kind == "cut":
        return kind, raw[: rng.randrange(len(raw))]
    if kind == "flipped":
        changed = bytearray(raw)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return kind, bytes(changed)
    if kind == "deep":
        depth = rng.randrange(10, 3000)
        return kind, b'{"model": "m", "messages": ' + b"[" * depth + b"]" * depth + b"}"
    if kind == "large":
        return kind, json.dumps({**seed, "pad": "x" * rng.randrange(300_000, 400_000)}).encode()
    if kind == "foreign":
        name = rng.choice(FOREIGN)
        return kind, json.dumps({**seed, name: rng.choice(NONSENSE)}).encode()
    body = replaced(seed, rng)
    if kind == "twice":
        body = replaced(body, rng) if isinstance(body, (dict, list)) and body else body
    return kind, json.dumps(body).encode()


def make_headers(secret: str, rng: random.Random) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    draw = rng.random()
    if draw < 0.02:
        headers["Authorization"] = rng.choice(("Bearer sk-intentd-x", "Basic eA==", "Bearer", ""))
    elif draw < 0.04:
        headers["X-Intentd-Service-Type"] = rng.choice(("why is the sky blue?", "x" * 300, "cost"))
    elif draw < 0.06:
        headers["X-Intentd-Conversation"] = rng.choice(("a b", "c" * 200, "c1"))
    elif draw < 0.08:
        headers["X-Request-Id"] = rng.choice(("mine", "not an id!", "x" * 500))
    return headers


@dataclass
class Findings:
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    unnamed: Counter[str] = field(default_factory=Counter)

    def look(self, path: str, kind: str, sent: bytes, status: int, raw: bytes, secret: str) -> None:
        self.statuses[status] += 1
        self.kinds[kind] += 1
        problem = ""
        for mark in (PROVIDER_SECRET, secret, "Traceback", 'File "'):
            if mark.encode() in raw:
                problem = f"{mark[:16]} in the answer"
        if status >= 500:
            problem = "a status over 499"
        elif status >= 400:
            problem = problem or self._refusal(path, status, raw)
        if problem and len(self.wrong) < 20:
            self.wrong.append(
                {"problem": problem, "path": path, "kind": kind, "status": status,
                 "sent": sent[:600].decode("latin-1"), "got": raw[:600].decode("latin-1")}
            )  # fmt: skip

    def _refusal(self, path: str, status: int, raw: bytes) -> str:
        try:
            error = json.loads(raw)["error"]
            message, kind = error["message"], error["type"]
        except (ValueError, KeyError, TypeError):
            return "an error of another shape"
        if not isinstance(message, str) or not message or not isinstance(kind, str):
            return "an error without message and type"
        if path.startswith("/v1/messages"):
            return "" if NAMED.match(message) else "an error that names no field"
        if status == 400 and not error["param"] and error["code"] != "invalid_json":
            self.unnamed[message[:80]] += 1
            return "a refusal that names no field"
        return ""


@asynccontextmanager
async def provider() -> AsyncIterator[str]:
    """Answers whatever it is asked."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        if request.path.endswith("/embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
            return web.json_response({"object": "list", "data": data, "usage": usage})
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        base = {"id": "c", "created": 1, "model": "m", "usage": usage}
        if not body.get("stream"):
            choice |= {"message": {"role": "assistant", "content": "9"}, "text": "9"}
            return web.json_response({**base, "choices": [choice]})
        choice["delta"] = {"content": "9"}
        chunk = json.dumps({**base, "choices": [choice]})
        return web.Response(
            text=f"data: {chunk}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        )

    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def fuzz(count: int, seed: int, base: Path) -> dict[str, Any]:
    """Send so many bodies; what was found."""
    os.environ["INTENTD_FUZZ_KEY"] = PROVIDER_SECRET
    found = Findings()
    async with provider() as url:
        more = 'api_key_env = "INTENTD_FUZZ_KEY"\nprice_in = "1"\nprice_out = "1"\nwindow = 20000'
        models = [("m", url, more), ("big", url, more.replace('"1"', '"2"'))]
        proxy = ProxyProcess(base, models, "[keys]\nrequired = true\n[batch]\nmax_requests = 20\n")
        await proxy.start()
        try:
            secret = (await proxy.admin("keys.new", name="fuzz", tenant="t", grants={}))["secret"]
            started_s = time.monotonic()
            await _send(proxy.url, count, seed, secret, found)
            seconds = time.monotonic() - started_s
            async with (
                aiohttp.ClientSession() as session,
                session.post(
                    f"{proxy.url}/v1/chat/completions",
                    json=CHAT,
                    headers={"Authorization": f"Bearer {secret}"},
                ) as response,
            ):
                alive = response.status == 200
        finally:
            proxy.end()
    log = (base / "log").read_text(errors="replace")
    marks = (PROVIDER_SECRET, secret, PROMPT_MARK, "Traceback")
    in_log = {mark: log.count(mark) for mark in marks if mark in log}
    return {
        "bodies": count,
        "seed": seed,
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(found.statuses.items())),
        "kinds": dict(found.kinds),
        "wrong": found.wrong,
        "unnamed": found.unnamed.most_common(20),
        "secrets_or_traces_in_log": in_log,
        "alive": alive,
        "passed": alive and not found.wrong and not in_log,
    }


async def _send(url: str, count: int, seed: int, secret: str, found: Findings) -> None:
    numbers = iter(range(count))
    paths = list(SEEDS)
    timeout = aiohttp.ClientTimeout(total=60)

    async def worker(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            rng = random.Random(f"{seed}/{number}")
            path = rng.choice(paths)
            kind, body = make_body(path, rng)
            target, method = path, "POST"
            if rng.random() < 0.02:
                target = rng.choice((path + "/x", *ELSEWHERE))
                method = rng.choice(("GET", "DELETE", "PUT", "POST"))
            async with session.request(
                method, url + target, data=body, headers=make_headers(secret, rng)
            ) as response:
                raw = await response.read()
            found.look(target, kind, body, response.status, raw, secret)
            if number % 10_000 == 9_999:
                progress(f"{number + 1} of {count}")

    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
        for place in range(WORKERS):
            tasks.create_task(worker(session), name=f"worker {place}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="intentd-fuzz-") as base:
        result = asyncio.run(fuzz(given.bodies, given.seed, Path(base) / "proxy"))
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
