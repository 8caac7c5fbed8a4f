"""What the proxy does with a prompt, shown with the official ``openai`` client and a real model.

    make demo-prompts

Starts SmolLM2 (``examples/small_model``) and the proxy, asks by each service type, for a better
answer, twice the same, and for the spend. One small model plays four, at four prices: what is shown
is who is asked, with which context and for how much money, not how good the answers are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

HERE = Path(__file__).parent
QUESTION = "Why is the sky blue?"
PATIENCE_S = 120.0
# enough to see that it answers; what it writes is a 135-million-parameter model's
ANSWER_TOKENS = 24
MODELS = (
    ("nano", "0.05", "0.20"),
    ("small", "0.15", "0.60"),
    ("medium", "1", "4"),
    ("large", "5", "20"),
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], log: Path, url: str, env: dict[str, str]) -> Iterator[None]:
    """A process that answers at url; ended by its number at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(url, timeout=2).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[-1]} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def write_config(base: Path, port: int, api: int) -> Path:
    config = base / "proxy.toml"
    lines = [
        f'state_dir = "{base}/state"\nrun_dir = "{base}/run"',
        "[controller]\nenabled = false\n[status]\nenabled = false",
        f'[listen]\nbind = "127.0.0.1:{api}"',
    ]
    for name, price_in, price_out in MODELS:
        lines.append(
            f'[[models]]\nname = "{name}"\nupstream_model = "smollm2-135m"\n'
            f'base_url = "http://127.0.0.1:{port}/v1"\nwindow = 2048\n'
            f"max_output_tokens = {ANSWER_TOKENS}\n"
            f'price_in = "{price_in}"\nprice_out = "{price_out}"'
        )
    config.write_text("\n".join(lines) + "\n")
    return config


class Show:
    """Asks, and prints what the proxy says it did."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        self.last = ""

    def ask(self, title: str, model: str, text: str = QUESTION, **fields: Any) -> None:
        began = time.monotonic()
        answer = self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            extra_body=fields or None,
        )
        told = answer.model_dump()["intentd"]
        self.last = told["request_id"]
        took_s = time.monotonic() - began
        self._print(title, answer.choices[0].message.content or "", told, took_s)

    def put(self, prompt: str, response: str) -> None:
        """Into the cache, as an application does. (Answers cut off by their bound are not kept,
        and those of this demo are.)"""
        body = {"object": {"prompt": prompt, "response": response}, "keys": [["prompt", prompt]]}
        request = urllib.request.Request(
            f"{self.url}/v1/cache",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
            method="PUT",
        )
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()

    def regenerate(self, title: str) -> None:
        request = urllib.request.Request(
            f"{self.url}/v1/regenerate",
            json.dumps({"id": self.last}).encode(),
            {"content-type": "application/json"},
        )
        began = time.monotonic()
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            body = json.load(response)
        self._print(title, body["response"], body["metadata"], time.monotonic() - began)

    @staticmethod
    def _print(title: str, text: str, told: dict[str, Any], took_s: float) -> None:
        calls = ", ".join(f"{call['model']} ({call['purpose']})" for call in told["models"])
        cache = told.get("cache") or {}
        hit = cache.get("result", "off") if isinstance(cache, dict) else cache
        print(f"\n== {title}\n   {' '.join(text.split())[:150]}")
        told_cache = hit if hit not in (None, "off") else "not asked"
        print(f"   asked: {calls or 'nobody'}; cost {told['cost']}; cache: {told_cache}", end="")
        print(f"; {took_s:.1f} s", flush=True)


def show(url: str) -> None:
    demo = Show(url)
    demo.ask("fixed: the model you name", "small")
    demo.ask("cost: the cheapest", "cost")
    demo.ask("quality: the dearest", "quality")
    demo.ask("model_selector: cheap, judged, dear if it must be", "model_selector")
    demo.ask("usage_based: curated models, with quotas", "usage_based")
    first = "My name is Ada. What is a good name for a cat?"
    demo.ask("smart_context: a conversation", "smart_context", first, intentd={"conversation": "c"})
    demo.ask("... its context sent only if needed", "smart_context", "What is two and two?",
             intentd={"conversation": "c"})  # fmt: skip
    demo.ask("latency: short, at once", "latency")
    tides = "How do tides come about?"
    demo.ask("smart_cache: what is not stored is asked", "smart_cache", tides)
    demo.put(tides, "The Moon and the Sun pull at the oceans while the Earth turns below.")
    demo.ask("smart_cache, after it was put there: from the cache", "smart_cache", tides)
    demo.ask("cost, to be regenerated", "cost", "What is rain?")
    demo.regenerate("regenerate: never by a cheaper model")


def main() -> None:
    parser = argparse.ArgumentParser(description="the proxy's service types, on a real small model")
    parser.add_argument("--suite-python", required=True, help="Python with intentd")
    parser.add_argument("--model-python", required=True, help="Python with the small model")
    options = parser.parse_args()
    model, api = free_port(), free_port()
    env = os.environ | {"PYTHONPATH": str(HERE.parent / "src")}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="intentd-demo-") as folder:
        base = Path(folder)
        config = write_config(base, model, api)
        serve = [
            options.model_python,
            str(HERE / "small_model" / "server.py"),
            "--port",
            str(model),
        ]
        proxy = [options.suite_python, "-m", "intentd.proxy.daemon", "--config", str(config)]
        print("starting SmolLM2 and the proxy ...", flush=True)
        url = f"http://127.0.0.1:{api}"
        with (
            running(serve, base / "model.log", f"http://127.0.0.1:{model}/health", env),
            running(proxy, base / "proxy.log", f"{url}/v1/models", env),
        ):
            show(url)
            print("\n== the spend")
            spend = [options.suite_python, "-m", "intentd.daemons.ctl", "prompts", "spend"]
            spend += ["--by", "service_type"]
            subprocess.run(spend, env=env | {"RUNTIME_DIRECTORY": str(base / "run")}, check=True)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
