"""Other gateways beside the proxy, each in an environment of its own, in front of one provider.

``python -m benchmarks.proxy_gateways DIR`` installs LiteLLM (pip) and Portkey (npm) there, what of
them can be had; ``python -m benchmarks.proxy --gateways DIR --json`` measures them in its rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

LITELLM = "litellm[proxy]==1.106.*"
PORTKEY = "@portkey-ai/gateway@1.15"
START_S = 180.0


def install(where: Path) -> None:
    """What can be had; what cannot is said on stderr."""
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "litellm" / "bin" / "litellm").exists():
        venv.create(where / "litellm", with_pip=True)
        pip = [where / "litellm" / "bin" / "python", "-m", "pip", "install", "--quiet", LITELLM]
        if subprocess.run(pip, check=False).returncode:
            print("LiteLLM could not be installed", file=sys.stderr)
    if not _portkey(where) and shutil.which("npm"):
        folder = where / "portkey"
        folder.mkdir(exist_ok=True)
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", PORTKEY]
        if subprocess.run(npm, check=False, cwd=folder).returncode:
            print("Portkey could not be installed", file=sys.stderr)


def _portkey(where: Path) -> Path | None:
    package = where / "portkey" / "node_modules" / "@portkey-ai" / "gateway"
    server = package / "build" / "start-server.js"
    return server if server.exists() and shutil.which("node") else None


def command(name: str, where: Path, port: int, provider: int, base: Path) -> list[str] | None:
    """How to start it in front of the provider; None when it is not there."""
    if name == "litellm":
        program = where / "litellm" / "bin" / "litellm"
        if not program.exists():
            return None
        config = base / "litellm.yaml"  # JSON is YAML
        model = {
            "model": "openai/m", "api_base": f"http://127.0.0.1:{provider}/v1", "api_key": "x",
        }  # fmt: skip
        document = {
            "model_list": [{"model_name": "m", "litellm_params": model}],
            # Without a key to check: the lightest it can be.
            "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
        }
        config.write_text(json.dumps(document))
        return [
            str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
            "--num_workers", "1",
        ]  # fmt: skip
    server = _portkey(where)
    return ["node", str(server), f"--port={port}", "--headless"] if server else None


def headers(name: str, provider: int) -> str:
    """Further request headers, each with its line end."""
    if name == "portkey":
        return (
            "x-portkey-provider: openai\r\n"
            f"x-portkey-custom-host: http://127.0.0.1:{provider}/v1\r\n"
        )
    return ""


@contextlib.contextmanager
def running(
    name: str, where: Path, provider: int, base: Path
) -> Iterator[tuple[int, int, float] | None]:
    """(port, process id, seconds until it listened) of one gateway; None when it is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = command(name, where, port, provider, base)
    if line is None:
        yield None
        return
    env = {
        **os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR",
        "PYTHONPATH": "", "NODE_ENV": "production",
    }  # fmt: skip
    began_s = time.perf_counter()
    with (base / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(line, env=env, stdout=log, stderr=log, cwd=base)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.perf_counter() - began_s > START_S:
                raise RuntimeError(f"{name}: {(base / f'{name}.log').read_text()[-800:]}")
            time.sleep(0.1)
        yield port, process.pid, time.perf_counter() - began_s
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("where", type=Path)
    install(parser.parse_args().where.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
