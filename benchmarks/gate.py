"""The gate on one host: latency, flows a second, what a flow costs the agent, idle cost.

    python -m benchmarks.gate --json

Starts an agent of its own (unshaped, no controller) in a temporary directory, and clients as
processes: Python's client library, and C by examples/c_client. "uncontended": no flow ever waits
(each client process alone, or classes without a gate); "one at a time": every flow goes through
one class with multiplexing level 1 and without the board (socket.board, where two programs may
start in a free class at once), so each turn is handed over. "paced": one client, a flow every
10 ms, for then the caches are cold, as they are on a host where flows come now and then.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from intentd.core.stats import percentile
from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
PAUSE_MS = 10
TICKS = os.sysconf("SC_CLK_TCK")

CONFIG = """
state_dir = "{base}/state"
run_dir = "{base}/run"
drain_timeout_s = 0
log = {{ level = "warning" }}
status = {{ enabled = false }}
controller = {{ enabled = false }}
socket = {{ board = {board} }}
[[domains]]
name = "up"
[domains.policy]
classes = [{{ threshold_bytes = inf, weight = 1, mpl = {mpl} }}]
"""

CLIENT = """
import sys, time
from intentd.agent.client import Flows
flows = Flows(sys.argv[1], answer_timeout_s=5.0)
count, pause_s = int(sys.argv[2]), int(sys.argv[3]) / 1e3
flows.open(100).close()
took = []
clock = time.monotonic_ns
began = clock()
for _ in range(count):
    if pause_s:
        time.sleep(pause_s)
    asked = clock()
    flow = flows.open(100)
    took.append(clock() - asked)
    flow.close()
print(began, clock())
assert not flows.degraded, flows.degraded
print(*took, sep="\\n")
"""


class Agent:
    """An agent process; mpl of its only class, 0: no gate."""

    def __init__(self, base: Path, mpl: int) -> None:
        base.mkdir()
        config = base / "agent.toml"
        config.write_text(CONFIG.format(base=base, mpl=mpl, board="false" if mpl else "true"))
        command = [sys.executable, "-m", "intentd.agent.daemon", "--config", str(config)]
        self.process = subprocess.Popen(command, env=ENV)
        self.socket = base / "run" / "agent.sock"
        self._admin = AdminClient(base / "run" / "agent.admin.sock")
        deadline = time.monotonic() + 60
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the agent did not start")
            time.sleep(0.02)

    def _ready(self) -> bool:
        try:
            return bool(self._admin.call("ready")["ready"])
        except AdminUnreachableError:
            return False

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def pss_bytes(self) -> int:
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        line = next(row for row in rollup.splitlines() if row.startswith("Pss:"))
        return int(line.split()[1]) * 1024

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def build(base: Path) -> Path | None:
    """The C client, None without a compiler."""
    program = base / "gate_client"
    sources = [ROOT / "benchmarks" / "gate_client.c", ROOT / "examples/c_client/intentd_flow.c"]
    command = ["cc", "-std=c11", "-O2", f"-I{ROOT / 'examples/c_client'}", "-o", str(program)]
    try:
        subprocess.run([*command, *map(str, sources)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        note(f"no C client: {error}")
        return None
    return program


def load(
    agent: Agent, command: list[str], processes: int, flows: int, pause_ms: int = 0
) -> dict[str, Any]:
    """processes clients at once, flows each, with a pause before each flow."""
    arguments = [*command, str(agent.socket), str(flows), str(pause_ms)]
    before = agent.cpu_s()
    began = time.monotonic()
    running = [
        subprocess.Popen(arguments, env=ENV, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a client failed")
    elapsed_s = time.monotonic() - began
    cpu_s = agent.cpu_s() - before
    rows = [[int(line) for line in output.split()] for output in outputs]
    took = sorted(ns for row in rows for ns in row[2:])
    # From the first flow of any to the last of all, on the clock they share; not their start-up.
    span_s = (max(row[1] for row in rows) - min(row[0] for row in rows)) / 1e9
    return {
        "processes": processes,
        "pause_ms": pause_ms,
        "flows": processes * flows,
        "flows_per_s": round(processes * flows / span_s),
        "open_to_grant_us": {
            "p50": round(percentile(took, 0.5) / 1e3, 1),
            "p90": round(percentile(took, 0.9) / 1e3, 1),
            "p99": round(percentile(took, 0.99) / 1e3, 1),
        },
        "agent_cpu_us_a_flow": round(cpu_s / (processes * flows) * 1e6, 1),
        "agent_cpu_share": round(cpu_s / elapsed_s, 3),
    }


def measure(flows: int, paced: int, idle_s: float, processes: list[int]) -> dict[str, Any]:
    result: dict[str, Any] = {"loads": []}
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        program = build(base)
        clients = {"python": [sys.executable, "-c", CLIENT]}
        if program is not None:
            clients["c"] = [str(program)]
        for name, mpl in (("uncontended", 0), ("one at a time", 1)):
            agent = Agent(base / f"mpl{mpl}", mpl)
            try:
                if mpl == 0:
                    note(f"idle for {idle_s:g} s")
                    time.sleep(1.0)
                    before = agent.cpu_s()
                    time.sleep(idle_s)
                    result["idle_cpu_share"] = round((agent.cpu_s() - before) / idle_s, 5)
                for kind, command in clients.items():
                    runs = [(count, flows, 0) for count in processes] + [(1, paced, PAUSE_MS)]
                    for count, each, pause_ms in runs:
                        figures = load(agent, command, count, each, pause_ms)
                        row = {"kind": kind, "gate": name, **figures}
                        result["loads"].append(row)
                        note(
                            f"{kind}, {name}, {count} processes{', paced' if pause_ms else ''}: "
                            f"{row['flows_per_s']} flows/s, "
                            f"open -> grant {row['open_to_grant_us']}, "
                            f"agent {row['agent_cpu_us_a_flow']} us a flow"
                        )
                result["pss_bytes"] = agent.pss_bytes()
            finally:
                agent.stop()
    for row in result["loads"]:
        if row["processes"] == 1 and row["gate"] == "uncontended":
            paced_or_not = "_paced" if row["pause_ms"] else ""
            key = f"{row['kind']}_open_to_grant{paced_or_not}_p50_us"
            result[key] = row["open_to_grant_us"]["p50"]
    result["flows_per_s_best"] = max(row["flows_per_s"] for row in result["loads"])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--flows", type=int, default=20_000, help="of each client process")
    parser.add_argument("--paced-flows", type=int, default=500, help="of the paced client")
    parser.add_argument("--processes", default="1,2,4", help="client processes, comma separated")
    parser.add_argument("--idle-s", type=float, default=20.0, help="how long to watch it idle")
    options = parser.parse_args()
    processes = [int(word) for word in options.processes.split(",")]
    result = measure(options.flows, options.paced_flows, options.idle_s, processes)
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"idle: {100 * result['idle_cpu_share']:.2f} % of a core")
    print(f"memory: {result['pss_bytes'] / 2**20:.1f} MB PSS")
    for row in result["loads"]:
        took = row["open_to_grant_us"]
        print(
            f"{row['kind']:7} {row['gate']:14} {'paced' if row['pause_ms'] else '':5}"
            f" x{row['processes']}  {row['flows_per_s']:>7} flows/s"
            f"  p50 {took['p50']:>7} us  p99 {took['p99']:>8} us"
            f"  agent {row['agent_cpu_us_a_flow']:>6} us a flow"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
