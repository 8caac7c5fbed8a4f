"""What five real daemons show: no secret anywhere; metrics that dashboards and docs know."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import pytest

from intentd.daemons.ctl.daemon import DAEMONS, daemon_class
from intentd.daemons.kit import keys
from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError
from intentd.daemons.kit.config import InvalidConfigError, load_config

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "HOME": "/nonexistent"}
TIMEOUT_S = 90.0

CONFIGS = {
    "controller": """
[hub]
bind = "tcp://127.0.0.1:0"
key_file = "{base}/own.key"
allow_file = "{base}/allow"
""",
    "sequencer": """
[turns]
bind = "tcp://127.0.0.1:0"
key_file = "{base}/own.key"
allow_file = "{base}/allow"
[fin]
bind = "127.0.0.1:0"
key_file = "{base}/fin.key"
""",
    "agent": """
[fin]
bind = "127.0.0.1:0"
key_file = "{base}/fin.key"
[[domains]]
name = "up"
[domains.sequencer]
endpoint = "tcp://127.0.0.1:9"
key_file = "{base}/own.key"
server_key_file = "{base}/own.key.pub"
""",
    "gpu": """
[jobs]
nodes = [{{name = "here", gpus = 1}}]
""",
    "proxy": """
[listen]
bind = "127.0.0.1:0"
[tracing]
endpoint = "http://127.0.0.1:9/v1/traces"
token_env = "PLANTED_TOKEN"
[[models]]
name = "small"
base_url = "http://127.0.0.1:9/v1"
api_key_env = "PLANTED_API_KEY"
price_in = "1"
price_out = "2"
[store]
url = "postgresql://intentd@127.0.0.1:9/nowhere"
password_env = "PLANTED_PASSWORD"
""",
}
COMMON = """
state_dir = "{base}/state"
run_dir = "{base}/run"
[log]
level = "debug"
[status]
bind = "127.0.0.1:{port}"
tokens = ["{token_hash}"]
"""
LINK = """
[controller]
endpoint = "tcp://127.0.0.1:9"
key_file = "{base}/own.key"
server_key_file = "{base}/own.key.pub"
"""


@dataclass
class Shown:
    """All one daemon said: text by where it was found."""

    role: str
    texts: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return str(answer.headers) + answer.read().decode()
    except urllib.error.HTTPError as error:
        return str(error.headers) + error.read().decode()


def start(role: str, base: Path, *, store: bool) -> tuple[subprocess.Popen[bytes], Shown, int]:
    """A daemon whose every secret is known. store: without it the proxy keeps its own state."""
    base.mkdir()
    shown = Shown(role)
    pair, fin, token = keys.new_curve_keys(), keys.new_fin_key(), secrets.token_urlsafe(24)
    keys.write_curve_keys(base / "own.key", pair)
    keys.write_fin_key(base / "fin.key", fin)
    (base / "allow").write_text(f"{keys.new_curve_keys().public.hex()} agent\n")
    planted = {
        f"PLANTED_{name}": secrets.token_hex(20) for name in ("API_KEY", "PASSWORD", "TOKEN")
    }
    shown.secrets = {
        "CURVE secret": pair.secret.hex(), "FIN key": fin.hex(), "bearer token": token, **planted,
    }  # fmt: skip
    port = free_port()
    text = COMMON + ("" if role == "controller" else LINK) + CONFIGS[role]
    if not store:
        text = text.partition("[store]")[0]
    file = base / "config.toml"
    token_hash = sha256(token.encode()).hexdigest()
    file.write_text(text.format(base=base, port=port, token_hash=token_hash))
    checked = subprocess.run(
        [sys.executable, "-m", DAEMONS[role], "--config", file, "--check-config"],
        env={**ENV, **planted}, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    shown.texts["check-config"] = checked.stdout + checked.stderr
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", DAEMONS[role], "--config", file],
            env={**ENV, **planted}, stdout=log, stderr=log,
        )  # fmt: skip
    return process, shown, port


def listen(process: subprocess.Popen[bytes], shown: Shown, base: Path, port: int) -> None:
    """Everything the daemon shows to whom may ask."""
    admin = AdminClient(base / "run" / f"{shown.role}.admin.sock")
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            admin.call("status")
            break
        except AdminUnreachableError:
            assert process.poll() is None, (base / "log").read_text()
            assert time.monotonic() < deadline, (base / "log").read_text()
            time.sleep(0.05)
    for command in ("status", "config", "metrics", "dump", "ready"):
        shown.texts[f"admin {command}"] = json.dumps(admin.call(command))
    for path in ("/status", "/metrics", "/readyz", "/livez"):
        shown.texts[path] = get(f"http://127.0.0.1:{port}{path}")


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shown]:
    base = tmp_path_factory.mktemp("surface")
    running = {role: start(role, base / role, store=False) for role in CONFIGS}
    try:
        for role, (process, shown, port) in running.items():
            listen(process, shown, base / role, port)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for role, (process, shown, _) in running.items():
            try:
                process.wait(TIMEOUT_S)
            finally:
                process.kill()
            shown.texts["log"] = (base / role / "log").read_text()
    return {role: shown for role, (_, shown, _) in running.items()}


def leaks(shown: Shown) -> list[str]:
    return [
        f"{shown.role}: {name} in {where}"
        for name, secret in shown.secrets.items()
        for where, text in shown.texts.items()
        if secret in text
    ]


def test_no_secret_is_shown(daemons: dict[str, Shown]) -> None:
    assert [leak for shown in daemons.values() for leak in leaks(shown)] == []
    for shown in daemons.values():  # there was something to look through
        assert len(shown.texts) == 11
        assert all(shown.texts[where] for where in ("log", "/status", "/metrics", "admin dump"))


def test_no_secret_is_shown_when_the_database_is_away(tmp_path: Path) -> None:
    process, shown, _ = start("proxy", tmp_path / "proxy", store=True)
    try:
        process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
    shown.texts["log"] = (tmp_path / "proxy" / "log").read_text()
    assert "the database cannot be reached" in shown.texts["log"]
    assert leaks(shown) == []


WRONG = {
    "a token that is not hashed": ("[status]\ntokens = ['{secret}']", "sequencer"),
    "a password in a database's address": (
        "[store]\nurl = 'postgresql://intentd:{secret}@db/intentd'", "proxy",
    ),
    "credentials in a provider's address": (
        "[[models]]\nname = 'm'\nbase_url = 'https://me:{secret}@host/v1'", "proxy",
    ),
    "a key where its variable's name belongs": (
        "[[models]]\nname = 'm'\nbase_url = 'https://h/v1'\napi_key_env = 'sk-{secret}'", "proxy",
    ),
    "a password where its variable's name belongs": (
        "[store]\nurl = 'postgresql://a@b/c'\npassword_env = 'p-{secret}'", "proxy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_secret_in_a_wrong_place_is_refused_and_not_repeated(what: str, tmp_path: Path) -> None:
    text, role = WRONG[what]
    secret = secrets.token_hex(20)
    file = tmp_path / "config.toml"
    file.write_text(text.format(secret=secret))
    with pytest.raises(InvalidConfigError) as caught:
        load_config(daemon_class(role).config_model, file, {})
    assert secret not in str(caught.value)


# -- metrics ---------------------------------------------------------------------------------------


def exposed(daemons: dict[str, Shown]) -> dict[str, str]:
    """Sample names of all daemons, of histograms and summaries each series -> family."""
    found: dict[str, str] = {}
    for shown in daemons.values():
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", shown.texts["/metrics"], re.M):
            found[name] = name
            if kind in ("histogram", "summary"):
                for suffix in ("_count", "_sum", "_bucket"):
                    found[name + suffix] = name
    return found


def test_dashboards_and_alerts_ask_for_metrics_that_exist(daemons: dict[str, Shown]) -> None:
    known = exposed(daemons)
    assert len(known) > 60
    files = [*sorted((ROOT / "dashboards").glob("*.json")), ROOT / "dashboards" / "alerts.yml"]
    assert len(files) == 5
    for file in files:
        asked = set(re.findall(r"\bintentd_[a-z0-9_]+", file.read_text()))
        assert asked, file.name
        assert asked - known.keys() == set(), file.name


def test_operations_names_every_metric(daemons: dict[str, Shown]) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    # A row may name several: `intentd_proxy_cache_items`, `_bytes`.
    documented: set[str] = set()
    for line in text.splitlines():
        stem = ""
        for word in re.findall(r"`([a-z_0-9]+)(?:\{[a-z_,]+\})?`", line):
            if word.startswith("intentd_"):
                stem = word
                documented.add(word)
            elif word.startswith("_") and stem:
                parts = stem.split("_")
                documented |= {"_".join(parts[:end]) + word for end in range(2, len(parts) + 1)}
    families = {f for f in exposed(daemons).values() if not f.endswith("_created")}
    ours = {name for name in families if name.startswith("intentd_")}
    assert sorted(ours - documented) == []
