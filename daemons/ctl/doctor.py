"""``intentctl doctor``: what must be true of the suite, looked up and proved.

Each check is a statement with the evidence for or against it and a cure. What is inside a daemon
(qdiscs, ledger, queue) the daemon proves itself (admin command ``prove``); the rest is found here.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import intentd
from intentd.core.errors import IntentdError
from intentd.daemons.ctl.output import ExitCode, JsonOption, print_json, print_table
from intentd.daemons.ctl.reach import admin_sockets
from intentd.daemons.ctl.reach import run_dir as usual_run_dir
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.hub import ROLES_OF

app = typer.Typer(add_completion=False)

MAX_CLOCK_S: Final = 1.0
MIN_FREE_BYTES: Final = 64 << 20
MIN_FREE_FILES: Final = 1000

Row = tuple[str, Claim]


@app.callback()
def _group() -> None:
    """Makes the one command below a subcommand."""


class Facts:
    """What the daemons of a run directory say of themselves; asked once."""

    def __init__(self, run_dir: Path, timeout_s: float = 30.0) -> None:
        self.run_dir = run_dir
        self.sockets = admin_sockets(run_dir)
        self.status: dict[str, dict[str, Any]] = {}
        self.config: dict[str, dict[str, Any]] = {}
        self.proofs: dict[str, dict[str, Any]] = {}
        self.silent: dict[str, str] = {}
        for role, path in self.sockets.items():
            client = AdminClient(path, timeout_s)
            try:
                self.status[role] = client.call("status")
                self.config[role] = client.call("config")
                self.proofs[role] = client.call("prove")
            except (AdminUnreachableError, AdminRefusedError) as error:
                self.silent[role] = str(error)

    @property
    def members(self) -> list[dict[str, Any]]:
        detail = self.status.get("controller", {}).get("detail", {})
        rows: list[dict[str, Any]] = detail.get("members", [])
        return rows


def examine(facts: Facts) -> list[Row]:
    """Every check, as (who, claim)."""
    rows: list[Row] = []
    for check in (
        answers, readiness, configurations, proofs, versions, policies, clocks, links, keys,
        directories, sockets,
    ):  # fmt: skip
        rows += check(facts)
    return rows


def answers(facts: Facts) -> Iterator[Row]:
    for role in facts.sockets:
        why = facts.silent.get(role)
        pid = facts.status.get(role, {}).get("pid")
        cure = f"systemctl status intentd-{role}; a daemon that was killed leaves its socket"
        yield (
            role,
            Claim(
                "answers",
                "the daemon answers on its admin socket",
                True if why is None else None,
                why or f"process {pid}",
                "" if why is None else cure,
            ),
        )


def readiness(facts: Facts) -> Iterator[Row]:
    for role, status in facts.status.items():
        found = "; ".join(status["reasons"]) or "ready"
        cure = "" if status["ready"] else "see the reason in docs/operations.md, failures and cures"
        yield role, Claim("ready", "the daemon is ready", status["ready"], found, cure)


def configurations(facts: Facts) -> Iterator[Row]:
    """A daemon runs its file, not the one before."""
    for role, status in facts.status.items():
        last = status["reload"]
        stands = not last["fallback"] and last["outcome"] not in ("refused", "returned", "stuck")
        found = f"generation {status['generation']}"
        if last["fallback"]:
            found += f", the last good one: {last['fallback']}"
        elif not stands:
            found += f": {last['outcome']}: {last['reason']}"
        path = status["config_path"] or "the defaults"
        cure = "" if stands else f"mend {path}; intentctl reload {role}"
        yield role, Claim("config", f"runs {path} as it was last loaded", stands, found, cure)


def proofs(facts: Facts) -> Iterator[Row]:
    for role, proof in facts.proofs.items():
        for plain in proof["claims"]:
            yield role, Claim(**plain)


def versions(facts: Facts) -> Iterator[Row]:
    mine = intentd.__version__
    found = [(role, status["version"]) for role, status in facts.status.items()]
    found += [(f"{m['role']}/{m['name']}", m["version"]) for m in facts.members if m["connected"]]
    for who, version in found:
        good = version == mine
        cure = "" if good else f"install {mine} there, or this tool in {version}; restart"
        yield who, Claim("version", f"version {mine} everywhere", good, version, cure)


def policies(facts: Facts) -> Iterator[Row]:
    """Members run what the controller has in force; a refusal is said with its reason."""
    newest = facts.status.get("controller", {}).get("policies", {})
    for member in facts.members:
        if not member["connected"]:
            continue
        for name, number in newest.items():
            if member["role"] not in ROLES_OF[name]:
                continue
            runs = member["policies"].get(name)
            refused = member["refused"].get(name, {}).get("reason", "")
            found = f"runs {_number(runs)}" + (f", refused: {refused}" if refused else "")
            cure = "intentctl policy show; a refusal names the setting" if runs != number else ""
            yield (
                f"{member['role']}/{member['name']}",
                Claim("policy", f"runs {name} {_number(number)}", runs == number, found, cure),
            )


def clocks(facts: Facts) -> Iterator[Row]:
    cure = "set up time synchronisation (chrony, systemd-timesyncd) on that host"
    statement = f"the clock agrees within {MAX_CLOCK_S:g} s"
    for role, status in facts.status.items():
        stepped = status["started_wall_s"] + status["uptime_s"] - time.time()
        good = abs(stepped) <= MAX_CLOCK_S
        found = f"stepped by {-stepped:.3f} s since the start"
        yield role, Claim("clock", statement, good, found, "" if good else cure)
    for member in facts.members:
        ahead = member.get("clock_ahead_s")
        if member["connected"] and ahead is not None:
            good = abs(ahead) <= MAX_CLOCK_S
            yield (
                f"{member['role']}/{member['name']}",
                Claim("clock", statement, good, f"{ahead:+.3f} s", "" if good else cure),
            )


def links(facts: Facts) -> Iterator[Row]:
    for role, status in facts.status.items():
        link = status["controller"]
        if link is None or role == "controller":
            continue
        found = link["endpoint"] + (f": {link['last_error']}" if link.get("last_error") else "")
        cure = "" if link["connected"] else "is the controller up, and are the keys right?"
        yield role, Claim("link", "the controller answers", link["connected"], found, cure)
    for member in facts.members:
        if not member["connected"]:
            who, heard = f"{member['role']}/{member['name']}", member["heard_s_ago"]
            yield who, Claim(
                "link", "the member reports", False, f"last heard {heard:.0f} s ago",
                "start it again; one that left for good is forgotten by itself",
            )  # fmt: skip


def keys(facts: Facts) -> Iterator[Row]:
    """Key files are their owner's alone, and public keys are the other half."""
    from intentd.daemons.kit.keys import read_curve_keys, read_curve_public, read_fin_keys

    hub = facts.config.get("controller", {}).get("hub", {}).get("key_file", "")
    for role, config in facts.config.items():
        for where, path in _key_files(config):
            fin = where == "fin.key_file"
            statement = f"{where} {path} is a {'FIN key' if fin else 'key pair'}, mode 0600"
            try:
                mode = stat.S_IMODE(path.stat().st_mode)
                if fin:
                    count = len(read_fin_keys(path))
                    cure = f"chmod 600 {path}" if mode & 0o077 else ""
                    found = f"mode {mode:04o}, {count} accepted"
                    yield role, Claim("key", statement, not cure, found, cure)
                    continue
                public = read_curve_keys(path).public
                told = Path(f"{path}.pub")
                same = not told.exists() or read_curve_public(told) == public
            except (OSError, IntentdError) as error:
                yield role, Claim("key", statement, False, str(error), "intentctl keys new")
                continue
            good = not mode & 0o077 and same
            found = f"mode {mode:04o}, {told.name} {'matches' if same else 'is another key'}"
            cure = f"chmod 600 {path}" if mode & 0o077 else f"write {told} from {path}"
            yield role, Claim("key", statement, good, found, "" if good else cure)
        server = config.get("controller", {}).get("server_key_file", "")
        if role != "controller" and server and hub:
            statement = "server_key_file is the controller's public key"
            try:
                good = read_curve_public(Path(server)) == read_curve_keys(Path(hub)).public
            except (OSError, IntentdError) as error:
                yield role, Claim("key", statement, None, str(error), "ask as root")
                continue
            cure = "" if good else f"copy {hub}.pub to {server}"
            yield role, Claim("key", statement, good, server, cure)


def directories(facts: Facts) -> Iterator[Row]:
    for role, config in facts.config.items():
        path = Path(config["state_dir"])
        statement = f"{path} is the daemon's to write, with space left"
        try:
            found, disk = path.stat(), os.statvfs(path)
            owner = Path(f"/proc/{facts.status[role]['pid']}").stat().st_uid
        except OSError as error:
            yield role, Claim("state-dir", statement, False, str(error), "make it, or restart")
            continue
        free, files = disk.f_bavail * disk.f_frsize, disk.f_favail
        writable = owner == 0 or (found.st_uid == owner and bool(found.st_mode & stat.S_IWUSR))
        writable = writable and not disk.f_flag & os.ST_RDONLY
        roomy = free >= MIN_FREE_BYTES and (files >= MIN_FREE_FILES or not disk.f_files)
        others = bool(found.st_mode & stat.S_IWOTH)
        evidence = (
            f"mode {stat.S_IMODE(found.st_mode):04o}, {free >> 20} MiB and {files} files left"
        )
        cure = "make room" if not roomy else f"chown and chmod 700 {path}; mount it for writing"
        good = writable and roomy and not others
        yield role, Claim("state-dir", statement, good, evidence, "" if good else cure)


def sockets(facts: Facts) -> Iterator[Row]:
    for role, path in facts.sockets.items():
        statement = f"{path} is closed to others"
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            yield role, Claim("socket", statement, None, str(error), "")
            continue
        good = not mode & stat.S_IRWXO
        yield (
            role,
            Claim(
                "socket", statement, good, f"mode {mode:04o}", "" if good else f"chmod o= {path}"
            ),
        )


def _key_files(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Path]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _key_files(value, f"{prefix}{name}.")
        elif name == "key_file" and value:
            yield f"{prefix}{name}", Path(value)


def _number(pair: Any) -> str:
    return f"{pair[0]}.{pair[1]}" if pair else "none"


def code_of(rows: list[Row]) -> ExitCode:
    """4 when something is false, 3 when something cannot be asked, else 0."""
    if any(claim.holds is False for _, claim in rows):
        return ExitCode.DEGRADED
    if not rows or any(claim.holds is None for _, claim in rows):
        return ExitCode.UNREACHABLE
    return ExitCode.OK


@app.command()
def doctor(
    run_dir: Annotated[Path | None, typer.Option(help="Directory of the admin sockets.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show what is true as well, not only what is not.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove what must be true; exits 4 if something is false, 3 if it cannot be asked."""
    rows = examine(Facts(run_dir or usual_run_dir()))
    code = code_of(rows)
    if as_json:
        checks = [{"who": who, **claim.to_plain()} for who, claim in rows]
        print_json({"ok": code is ExitCode.OK, "checks": checks})
        raise typer.Exit(int(code))
    words = {True: "true", False: "FALSE", None: "cannot be asked"}
    shown = [row for row in rows if everything or row[1].holds is not True]
    if shown:
        print_table(
            ("who", "check", "what must be true", "", "evidence", "cure"),
            [(w, c.check, c.statement, words[c.holds], c.evidence, c.cure) for w, c in shown],
        )
    true = sum(claim.holds is True for _, claim in rows)
    print(f"{true} of {len(rows)} checks are true" if rows else "no daemon runs here")
    raise typer.Exit(int(code))
