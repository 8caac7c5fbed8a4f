"""Exact versions with hashes of everything an extra of setup.cfg brings along.

    python packaging/locks.py check            the locks are those of setup.cfg (fast, offline)
    python packaging/locks.py export EXTRA     requirements for pip install --require-hashes
    python packaging/locks.py update [EXTRA..] make them anew with uv, named by $UV or found in PATH

``locks/EXTRA.txt`` lists NAME==VERSION; ``locks/hashes.txt`` has the hashes of each, once for all
extras, so that a changed version is a changed line. ``tools`` is tools.in: what builds packages.
Neither says where to download from: hashes make that not matter. Python 3.11, Linux.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCKS = HERE / "locks"
HASHES = LOCKS / "hashes.txt"
PYTHON = "3.11"
TOOLS = "tools"
_NESTED = re.compile(r"%\((.*)\)s\Z")
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")


class LockError(Exception):
    """What is wrong with the locks, one line each."""


def extras() -> dict[str, list[str]]:
    """Each extra's requirements, those of the extras it contains included; ``tools`` as well."""
    parser = configparser.RawConfigParser()
    parser.read(HERE.parent / "setup.cfg", encoding="utf-8")
    section = dict(parser["options.extras_require"])

    def expanded(name: str) -> set[str]:
        found: set[str] = set()
        for line in section[name].splitlines():
            if nested := _NESTED.match(line.strip()):
                found |= expanded(nested.group(1))
            elif line.strip():
                found.add(line.strip())
        return found

    listed = {name: sorted(expanded(name), key=str.lower) for name in section}
    lines = (HERE / "tools.in").read_text().splitlines()
    return listed | {TOOLS: [line for line in lines if line and not line.startswith("#")]}


def normal(name: str) -> str:
    """A project's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def digest(requirements: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(requirements).encode()).hexdigest()


def heading(extra: str, requirements: Iterable[str]) -> str:
    return f"# {extra}: {digest(requirements)}"


def pins(text: str) -> dict[str, str]:
    """Name -> version of the lines of a lock."""
    return {normal(found[1]): found[2] for found in map(_PIN.match, text.splitlines()) if found}


def hashes() -> dict[str, list[str]]:
    """NAME==VERSION -> its hashes."""
    found: dict[str, list[str]] = {}
    for line in HASHES.read_text().splitlines():
        if line and not line.startswith("#"):
            pin, *digests = line.split()
            found[pin] = digests
    return found


def check() -> None:
    """Raises LockError."""
    wrong: list[str] = []
    known = hashes()
    used: set[str] = set()
    wanted = extras()
    for extra, requirements in wanted.items():
        path = LOCKS / f"{extra}.txt"
        if not path.exists():
            wrong.append(f"{extra}: has no lock")
            continue
        text = path.read_text()
        locked = pins(text)
        if text.splitlines()[0] != heading(extra, requirements):
            wrong.append(f"{extra}: setup.cfg asks for other things than when it was locked")
        for name, version in pins("\n".join(requirements)).items():
            if locked.get(name) != version:
                wrong.append(f"{extra}: {name}=={version} is locked as {locked.get(name)}")
        keys = {f"{name}=={version}" for name, version in locked.items()}
        wrong += [f"{extra}: no hash of {key}" for key in sorted(keys - known.keys())]
        used |= keys
    wrong += [f"hashes.txt: nothing uses {key}" for key in sorted(known.keys() - used)]
    gone = {path.stem for path in LOCKS.glob("*.txt")} - wanted.keys() - {HASHES.stem}
    wrong += [f"{name}: no such extra in setup.cfg" for name in sorted(gone)]
    if wrong:
        raise LockError("\n".join([*wrong, "make locks makes them anew"]))


def export(extra: str) -> str:
    """The requirements of an extra with their hashes, as pip reads them. Raises LockError."""
    path = LOCKS / f"{extra}.txt"
    if not path.exists():
        raise LockError(f"{extra}: no such lock; there are {', '.join(extras())}")
    known = hashes()
    lines = []
    for name, version in pins(path.read_text()).items():
        digests = [f"--hash={value}" for value in known[f"{name}=={version}"]]
        lines.append(" \\\n    ".join([f"{name}=={version}", *digests]))
    return "\n".join(lines) + "\n"


def update(chosen: Sequence[str]) -> None:
    """Resolve the extras named, or all, and write their locks."""
    wanted = extras()
    LOCKS.mkdir(exist_ok=True)
    known = hashes() if HASHES.exists() else {}
    # One version of each for all extras, so that any can be added to an environment with others.
    together = {line for name, lines in wanted.items() if name != TOOLS for line in lines}
    everything = sorted(resolve("all extras together", sorted(together)))
    for extra in chosen or wanted:
        print(f"locking {extra}", file=sys.stderr)
        found = resolve(extra, wanted[extra], () if extra == TOOLS else everything)
        known |= found
        body = "\n".join(sorted(found))
        (LOCKS / f"{extra}.txt").write_text(f"{heading(extra, wanted[extra])}\n{body}\n")
    locked = [pins(path.read_text()) for path in LOCKS.glob("*.txt") if path != HASHES]
    used = {f"{name}=={version}" for pinned in locked for name, version in pinned.items()}
    lines = [" ".join([key, *sorted(known[key])]) for key in sorted(used)]
    HASHES.write_text("# NAME==VERSION and the hashes of its files\n" + "\n".join(lines) + "\n")


def resolve(
    extra: str, requirements: Sequence[str], constraints: Sequence[str] = ()
) -> dict[str, list[str]]:
    """NAME==VERSION -> hashes of what requirements need. Raises LockError."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, lock, limits = (Path(folder) / name for name in ("wanted", "lock", "limits"))
        wanted.write_text("\n".join(requirements) + "\n")
        limits.write_text("\n".join(constraints) + "\n")
        command = [
            os.environ.get("UV", "uv"), "pip", "compile", "--quiet", "--generate-hashes",
            "--python-version", PYTHON, "--python-platform", "linux", "--no-header",
            "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--allow-unsafe",
            "--constraint", str(limits), "--output-file", str(lock), str(wanted),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LockError(f"{extra}: {result.stderr.strip()}")
        text = lock.read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := _PIN.match(line):
            digests = re.findall(r"--hash=(\S+)", line)
            found[f"{normal(match[1])}=={match[2]}"] = digests
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    commands.add_parser("export").add_argument("extra")
    commands.add_parser("update").add_argument("extras", nargs="*")
    arguments = parser.parse_args(argv)
    try:
        match arguments.command:
            case "check":
                check()
            case "export":
                sys.stdout.write(export(arguments.extra))
            case _:
                update(arguments.extras)
    except LockError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
