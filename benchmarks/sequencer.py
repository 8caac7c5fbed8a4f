"""How fast the sequencer daemon gives out turns, beside a bare echo on the same machine.

``python -m benchmarks.sequencer --agents 18 --ids-per-request 1,8,32 --json``: the real daemon as
a process, a load generator in C (turn_load.c, closed loop), and as the measure of what pyzmq allows
here an echo: a ROUTER watched by its descriptor in uvloop, recv_multipart and send_multipart,
drained to EAGAIN. Rounds of echo and sequencer alternate, so that both meet the same machine; with
and without CURVE. Bars: .75 of the echo's requests a second, 200,000 ids a second at 8 ids a
request, p99 below 2 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("turn_load.c")
RATIO_BAR = 0.75
IDS_BAR = 200_000
P99_BAR_US = 2000.0


def build(directory: Path) -> Path:
    """The load generator, compiled. Needs gcc and libzmq's headers."""
    binary = directory / "turn_load"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", binary, SOURCE, "-lzmq"], check=True)
    return binary


def load(
    binary: Path, endpoint: str, mode: str, agents: int, ids: int, seconds: float, keys: list[str]
) -> dict[str, Any]:
    command = [str(binary), endpoint, mode, str(agents), str(ids), str(seconds), *keys]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, timeout=seconds * 5 + 30, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def cpu_s(pid: int) -> float:
    """Processor seconds a process has used, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed_load(pid: int, *arguments: Any) -> dict[str, Any]:
    """A round, and the server's processor time a request, which holds on a busy machine too."""
    before = cpu_s(pid)
    result = load(*arguments)
    result["cpu_us"] = (cpu_s(pid) - before) / result["requests"] * 1e6
    return result


@contextlib.contextmanager
def process(command: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        command, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def echo(secured: dict[str, Path] | None) -> Iterator[tuple[str, int]]:
    keys = [str(secured["server"])] if secured else []
    with process(
        [sys.executable, "-m", "benchmarks.sequencer", "--serve-echo", *keys], {}
    ) as child:
        assert child.stdout is not None
        yield child.stdout.readline().strip(), child.pid


@contextlib.contextmanager
def sequencer(
    directory: Path, port: int, secured: dict[str, Path] | None
) -> Iterator[tuple[str, int]]:
    """The daemon; entered once it gives out turns."""
    status = port + 1
    environ = {
        "INTENTD_SEQUENCER__TURNS__BIND": f"tcp://127.0.0.1:{port}",
        "INTENTD_SEQUENCER__STATUS__BIND": f"127.0.0.1:{status}",
        "INTENTD_SEQUENCER__STATE_DIR": str(directory / "state"),
        "INTENTD_SEQUENCER__RUN_DIR": str(directory / "run"),
        "INTENTD_SEQUENCER__CONTROLLER__ENABLED": "false",
        "INTENTD_SEQUENCER__LOG__LEVEL": "warning",
    }
    if secured:
        environ["INTENTD_SEQUENCER__TURNS__KEY_FILE"] = str(secured["server"])
        environ["INTENTD_SEQUENCER__TURNS__ALLOW_FILE"] = str(secured["allow"])
    config = directory / "sequencer.toml"
    config.write_text("")
    command = [sys.executable, "-m", "intentd.daemons.sequencer.daemon", "--config", str(config)]
    with process(command, environ) as child:
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{status}/readyz", timeout=1):
                    break
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the sequencer does not become ready") from None
                time.sleep(0.1)
        yield f"tcp://127.0.0.1:{port}", child.pid


def make_keys(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Files for the server, and the client's arguments."""
    from intentd.daemons.kit.keys import new_curve_keys, write_curve_keys

    server, client = new_curve_keys(), new_curve_keys()
    files = {"server": directory / "server.key", "allow": directory / "allow"}
    write_curve_keys(files["server"], server)
    files["allow"].write_text(f"{client.public.hex()} agent\n")
    return files, [server.public.hex(), client.public.hex(), client.secret.hex()]


async def serve_echo(key_file: str) -> None:
    """A ROUTER that returns what it gets, for ever."""
    import zmq

    from intentd.daemons.kit.keys import read_curve_keys

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    if key_file:
        keys = read_curve_keys(Path(key_file))
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    router.bind("tcp://127.0.0.1:*")
    loop = asyncio.get_running_loop()

    def drain() -> None:
        receive, send = router.recv_multipart, router.send_multipart
        try:
            for _ in range(128):
                send(receive(zmq.NOBLOCK))
        except zmq.Again:
            return
        loop.call_soon(drain)

    loop.add_reader(router.getsockopt(zmq.FD), drain)
    loop.call_soon(drain)
    print(router.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode(), flush=True)
    await asyncio.Event().wait()


def measure(arguments: argparse.Namespace, binary: Path, directory: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    files, client_keys = make_keys(directory)
    sizes = [int(part) for part in arguments.ids_per_request.split(",")]
    for name, secured, keys in (("plain", None, []), ("curve", files, client_keys)):
        room = directory / name
        room.mkdir()
        with (
            echo(secured) as (echo_at, echo_pid),
            sequencer(room, arguments.port, secured) as (turns_at, turns_pid),
        ):
            table: dict[str, Any] = {}
            for ids in sizes:
                rows = []
                for number in range(arguments.rounds):
                    print(f"{name}, {ids} ids, round {number + 1}", file=sys.stderr)
                    seconds, agents = arguments.seconds, arguments.agents
                    rest = (agents, ids, seconds, keys)
                    bare = timed_load(echo_pid, binary, echo_at, "echo", *rest)
                    ours = timed_load(turns_pid, binary, turns_at, "turns", *rest)
                    rows.append((bare, ours))
                table[str(ids)] = summary(rows, ids)
            results[name] = table
    return results


def summary(rows: list[tuple[dict[str, Any], dict[str, Any]]], ids: int) -> dict[str, Any]:
    """Medians over the rounds; the ratio is of neighbours."""

    def rate(row: dict[str, Any]) -> float:
        return row["requests"] / row["seconds"]

    ours = statistics.median(rate(row[1]) for row in rows)
    return {
        "requests_per_s": round(ours),
        "ids_per_s": round(ours * ids),
        "p50_us": statistics.median(row[1]["p50_us"] for row in rows),
        "p99_us": statistics.median(row[1]["p99_us"] for row in rows),
        "echo_requests_per_s": round(statistics.median(rate(row[0]) for row in rows)),
        "echo_p99_us": statistics.median(row[0]["p99_us"] for row in rows),
        "cpu_us": round(statistics.median(row[1]["cpu_us"] for row in rows), 1),
        "echo_cpu_us": round(statistics.median(row[0]["cpu_us"] for row in rows), 1),
        "ratio": round(statistics.median(rate(row[1]) / rate(row[0]) for row in rows), 3),
    }


def verdict(results: dict[str, Any]) -> dict[str, bool]:
    cells = [cell for table in results.values() for cell in table.values()]
    eights = [table["8"]["ids_per_s"] for table in results.values() if "8" in table]
    return {
        "ratio": all(cell["ratio"] >= RATIO_BAR for cell in cells),
        "ids_per_s": all(rate >= IDS_BAR for rate in eights),
        "p99": all(cell["p99_us"] < P99_BAR_US for cell in cells),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, default=18)
    parser.add_argument("--ids-per-request", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="a round")
    parser.add_argument("--port", type=int, default=17410)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve-echo", nargs="?", const="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_echo is not None:
        import uvloop

        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(serve_echo(arguments.serve_echo))
        return 0
    with tempfile.TemporaryDirectory(prefix="intentd-bench-") as name:
        directory = Path(name)
        results = measure(arguments, build(directory), directory)
    document = {"agents": arguments.agents, "results": results, "bars": verdict(results)}
    if arguments.json:
        print(json.dumps(document))
        return 0
    for mode, table in results.items():
        for ids, cell in table.items():
            print(
                f"{mode:<6}{ids:>4} ids: {cell['requests_per_s']:>7} requests/s, "
                f"{cell['ids_per_s']:>8} ids/s, p50 {cell['p50_us']:.0f} us, p99 "
                f"{cell['p99_us']:.0f} us; {cell['ratio']:.2f} of the echo"
            )
    print("bars:", document["bars"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
