"""The sequencer as a process: turns, FINs, restarts, garbage, clients that close."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from intentd.core.errors import WireError
from intentd.core.flows.fin import FinSigner
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.wire import Run
from intentd.daemons.kit.admin import AdminClient
from intentd.daemons.kit.keys import new_curve_keys, write_curve_keys, write_fin_key

pytestmark = pytest.mark.real

LIMIT_S = 60.0
KEY = bytes(range(32))
DOMAIN = wire.name_id("link")
ROOT = Path(__file__).parents[2]


class Sequencer:
    """The daemon; start waits until it gives out turns."""

    def __init__(self, directory: Path, **environ: str) -> None:
        self.directory = directory
        self.fin_key = directory / "fin.key"
        write_fin_key(self.fin_key, KEY)
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "INTENTD_SEQUENCER__STATE_DIR": str(directory / "state"),
            "INTENTD_SEQUENCER__RUN_DIR": str(directory / "run"),
            "INTENTD_SEQUENCER__STATUS__BIND": "127.0.0.1:0",
            "INTENTD_SEQUENCER__CONTROLLER__ENABLED": "false",
            "INTENTD_SEQUENCER__TURNS__BIND": "tcp://127.0.0.1:*",
            "INTENTD_SEQUENCER__TURNS__LEASE_S": "0.5",
            "INTENTD_SEQUENCER__TURNS__HEARTBEAT_S": "0.1",
            "INTENTD_SEQUENCER__TURNS__RECOVER_S": "0.5",
            "INTENTD_SEQUENCER__FIN__BIND": "127.0.0.1:0",
            "INTENTD_SEQUENCER__FIN__KEY_FILE": str(self.fin_key),
            **environ,
        }
        (directory / "sequencer.toml").write_text("")
        self.admin = AdminClient(directory / "run" / "sequencer.admin.sock", LIMIT_S)
        self.popen: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        module = "intentd.daemons.sequencer.daemon"
        return [sys.executable, "-m", module, "--config", str(self.directory / "sequencer.toml")]

    def start(self, holds: str = "ready") -> Sequencer:
        with (self.directory / "log").open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, env=self.environ, cwd=self.directory, stderr=log
            )
        self.until(lambda: self.status()["ready"] or holds != "ready")
        return self

    def until(self, holds: Any) -> None:
        deadline = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(Exception):
                if holds():
                    return
            assert time.monotonic() < deadline, (self.directory / "log").read_text()[-3000:]
            assert self.popen is not None
            assert self.popen.poll() is None, (self.directory / "log").read_text()[-3000:]
            time.sleep(0.02)

    def status(self) -> dict[str, Any]:
        return self.admin.call("status")

    @property
    def detail(self) -> dict[str, Any]:
        detail: dict[str, Any] = self.status()["detail"]
        return detail

    def cpu_s(self) -> float:
        assert self.popen is not None
        text = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")

    def pss_bytes(self) -> int:
        assert self.popen is not None
        for line in Path(f"/proc/{self.popen.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no Pss")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.popen is not None
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(LIMIT_S)


@pytest.fixture
def sequencer(tmp_path: Path) -> Iterator[Sequencer]:
    daemon = Sequencer(tmp_path).start()
    try:
        yield daemon
    finally:
        daemon.stop(signal.SIGKILL)


class Client:
    """One member of the domain, by hand."""

    def __init__(self, endpoint: str, name: str = "a", boot: int = 1) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1e3))
        self.name, self.boot, self.sequence, self.number, self.epoch = name, boot, 0, 0, 0
        self.endpoint = endpoint

    def connect(self) -> Client:
        self.socket.connect(self.endpoint)
        return self

    def ask(self, message: wire.Message) -> wire.Message:
        self.socket.send(wire.encode(message))
        return wire.decode(self.socket.recv())

    def hello(self, *held: Run) -> wire.Welcome:
        self.sequence += 1
        answer = self.ask(
            wire.Hello("link", self.name, self.boot, self.epoch, self.sequence, self.number, held)
        )
        assert isinstance(answer, wire.Welcome), answer
        self.epoch = answer.epoch
        return answer

    def tickets(self, count: int = 1) -> wire.Tickets:
        self.number += 1
        answer = self.ask(
            wire.TicketRequest(DOMAIN, self.epoch, 0, count, self.number, self.number - 1)
        )
        assert isinstance(answer, wire.Tickets), answer
        return answer

    def state(self) -> wire.State:
        answer = self.ask(wire.Probe(DOMAIN, self.epoch, 0, 1))
        assert isinstance(answer, wire.State), answer
        return answer

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@contextlib.contextmanager
def member(daemon: Sequencer, name: str = "a", boot: int = 1) -> Iterator[Client]:
    client = Client(daemon.detail["endpoint"], name, boot).connect()
    try:
        client.hello()
        yield client
    finally:
        client.close()


def test_turns_and_fins(sequencer: Sequencer) -> None:
    with member(sequencer) as a, member(sequencer, "b", 2) as b:
        first, second = a.tickets(8), b.tickets()
        assert (first.first, second.first) == (1, 9)
        assert b.state().floor == 0
        host, _, port = sequencer.detail["fin"]["address"].rpartition(":")
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with udp:
            mine = FinSigner.from_domain_key(KEY, "b", 2).sign(DOMAIN, a.epoch, (Run(0, 1, 8),))
            udp.sendto(mine, (host, int(port)))  # b may not finish what a holds
            theirs = FinSigner.from_domain_key(KEY, "a", 1).sign(DOMAIN, a.epoch, (Run(0, 1, 7),))
            udp.sendto(theirs, (host, int(port)))
            udp.sendto(theirs, (host, int(port)))
            udp.sendto(b"junk", (host, int(port)))
            sequencer.until(lambda: b.state().floor == 7)
            sequencer.until(lambda: sequencer.detail["fin"]["dropped"]["malformed"] == 1)
        detail = sequencer.detail
        assert detail["fin"]["dropped"]["replayed"] == 1
        assert detail["counts"]["foreign_runs"] == 1


def test_the_lease_of_a_client_that_goes_runs_out(sequencer: Sequencer) -> None:
    with member(sequencer, "b", 2) as b:
        with member(sequencer) as a:
            a.tickets(3)
        mine = b.tickets()
        sequencer.until(lambda: b.state().lease == 0b111 or b.state().floor == 3)
        sequencer.until(lambda: b.state().floor == mine.first - 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_brings_a_higher_epoch_and_keeps_what_is_held(
    tmp_path: Path, number: signal.Signals
) -> None:
    daemon = Sequencer(tmp_path).start()
    try:
        with member(daemon) as a:
            held = a.tickets(4)
            epoch = a.epoch
        code = daemon.stop(number)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        daemon.environ["INTENTD_SEQUENCER__TURNS__RECOVER_S"] = "3"
        daemon.environ["INTENTD_SEQUENCER__TURNS__LEASE_S"] = "3"
        daemon.start("recovering")
        daemon.until(lambda: daemon.detail["recovering"])
        client = Client(daemon.detail["endpoint"]).connect()
        try:
            client.epoch, client.number, client.sequence = epoch, 1, 5
            run = Run(0, held.first, held.count)
            welcome = client.hello(run)
            assert welcome.epoch > epoch
            assert welcome.accepted == (run,)
            # Keeps its lease meanwhile: recovering takes as long as a lease does.
            daemon.until(lambda: client.hello(run).epoch and daemon.status()["ready"])
            assert client.tickets().first == held.first + held.count
        finally:
            client.close()
    finally:
        daemon.stop(signal.SIGKILL)


def garbage(rng: random.Random) -> list[bytes]:
    """Frames: random, truncated, mutated, many-part, empty, too long."""
    hello = wire.encode(wire.Hello("link", "x", 1, 0, 1, 0))
    request = wire.encode(wire.TicketRequest(DOMAIN, 1, 0, 1, 1, 0))
    beat = wire.encode(wire.Heartbeat(DOMAIN, 1, 1, 0, (Run(0, 1, 5),)))
    kind = rng.randrange(8)
    if kind == 0:
        return [rng.randbytes(rng.randrange(80))]
    if kind == 1:
        return [rng.randbytes(3) for _ in range(rng.randrange(2, 6))]
    if kind == 2:
        return [b""]
    if kind == 3:
        return [bytes((rng.randrange(1, 22), rng.randrange(3))) + rng.randbytes(rng.randrange(60))]
    if kind == 4 and rng.random() < 0.02:
        return [bytes(20_000)]
    frame = bytearray(rng.choice((hello, request, beat)))
    for _ in range(rng.randrange(1, 4)):
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    return [bytes(frame)]


def test_no_bytes_and_no_closing_client_make_it_spin_leak_or_die(sequencer: Sequencer) -> None:
    rng = random.Random(5)
    endpoint = sequencer.detail["endpoint"]
    port = int(endpoint.rpartition(":")[2])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with member(sequencer, "good", 77) as good:
        sizes = []
        for _ in range(4):
            for _ in range(6):
                client = context.socket(zmq.DEALER)
                client.setsockopt(zmq.LINGER, 200)
                client.connect(endpoint)
                for _ in range(250):
                    client.send_multipart(garbage(rng))
                client.close()  # answers on their way find nobody
            for _ in range(20):  # not ZeroMQ at all
                with socket.create_connection(("127.0.0.1", port)) as raw:
                    raw.sendall(rng.randbytes(100))
            for _ in range(2000):
                with contextlib.suppress(WireError):
                    good.hello()
                    break
            sequencer.until(lambda: good.state() is not None)
            sizes.append(sequencer.pss_bytes())
        assert good.tickets().count == 1
        assert sequencer.detail["counts"]["malformed"] > 1000
        # The first round fills caches and pools; afterwards memory must stay where it is.
        assert sizes[-1] < sizes[0] + 4 * 2**20
    context.term()
    sequencer.until(lambda: sequencer.detail["sessions"] == 0)
    assert sequencer.pss_bytes() < 60 * 2**20
    before, since = sequencer.cpu_s(), time.monotonic()
    time.sleep(1.0)  # the interval over which idleness is measured, not a wait for something
    assert sequencer.cpu_s() - before < 0.3 * (time.monotonic() - since)
    assert sequencer.stop() == 0


def test_curve_lets_in_only_listed_keys(tmp_path: Path) -> None:
    server, known, unknown = new_curve_keys(), new_curve_keys(), new_curve_keys()
    write_curve_keys(tmp_path / "server.key", server)
    (tmp_path / "allow").write_text(f"{known.public.hex()} agent@a\n")
    daemon = Sequencer(
        tmp_path,
        INTENTD_SEQUENCER__TURNS__KEY_FILE=str(tmp_path / "server.key"),
        INTENTD_SEQUENCER__TURNS__ALLOW_FILE=str(tmp_path / "allow"),
    ).start()
    try:
        answered = []
        for keys in (unknown, known):
            client = Client(daemon.detail["endpoint"])
            client.socket.setsockopt(zmq.RCVTIMEO, 700 if keys is unknown else 30_000)
            client.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            client.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            client.socket.setsockopt(zmq.CURVE_SERVERKEY, server.public)
            client.connect()
            try:
                if keys is known:  # but not under another's name
                    refusal = client.ask(wire.Hello("link", "b", 1, 0, 1, 0))
                    assert isinstance(refusal, wire.Error)
                    assert refusal.code == wire.ERROR_NAME
                client.hello()
                assert client.tickets().first == 1
                answered.append(keys)
            except zmq.Again:
                pass
            finally:
                client.close()
        assert answered == [known]
    finally:
        daemon.stop(signal.SIGKILL)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("FIN__KEY_FILE", "", "state"),
        ("FIN__KEY_FILE", "/nonexistent", "/nonexistent"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, setting: str, value: str, words: str) -> None:
    daemon = Sequencer(tmp_path)
    environ = {**daemon.environ, f"INTENTD_SEQUENCER__{setting}": value}
    if words == "state":
        blocked = tmp_path / "file"
        blocked.write_text("")
        environ["INTENTD_SEQUENCER__STATE_DIR"] = str(blocked / "state")
    done = subprocess.run(
        daemon.command,
        env=environ,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
