"""What a daemon starts with: its arguments, its file, or the last good one where that is wrong.

A wrong file at a restart (an upgrade, a reboot) would leave a host without its daemon although a
configuration is known that worked. Then the daemon runs that one, and says so wherever it can: in
the log, in ``/status``, by a metric with an alert rule, by ``intentctl doctor``. It stays so until
a reload takes a file. Without a last good one, with --strict, and for a file that is not there, the
errors are printed and the exit status is 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import intentd
from intentd.daemons.kit.config import (
    CommonConfig,
    InvalidConfigError,
    default_config_path,
    default_state_dir,
    parse_config,
    read_source,
)
from intentd.daemons.kit.generations import good_path

EXIT_OK: Final = 0
EXIT_USAGE: Final = 2

C = TypeVar("C", bound=CommonConfig)


@dataclass(frozen=True, slots=True)
class Start(Generic[C]):
    """read: the configuration as it is now. refused: why the file does not run, but the last good
    one; else empty."""

    config: C
    source: bytes
    path: Path | None
    read: Callable[[], tuple[C, bytes]]
    refused: str = ""


def start_of(role: str, model: type[C], argv: Sequence[str] | None) -> Start[C] | int:
    """What to start with, or the exit status: there is nothing to start."""
    arguments = _parse_arguments(role, argv)
    path: Path | None = arguments.config
    if path is None and default_config_path(role).exists():
        path = default_config_path(role)

    def read() -> tuple[C, bytes]:
        source = read_source(path)
        return parse_config(model, source, os.environ), source

    try:
        config, source = read()
    except InvalidConfigError as error:
        origin = path or "environment"
        for item in error.errors:
            print(f"intentd-{role}: {origin}: {item}", file=sys.stderr)
        if path is None or not path.exists() or arguments.strict or arguments.check_config:
            return EXIT_USAGE
        good = last_good(role, model, path, os.environ)
        if good is None:
            return EXIT_USAGE
        kept = good_path(good[0].state_dir, role)
        print(f"intentd-{role}: runs the last good configuration, {kept}", file=sys.stderr)
        return Start(*good, path, read, "; ".join(map(str, error.errors)))
    if arguments.check_config:
        print(f"intentd-{role}: {path or 'defaults'}: ok")
        return EXIT_OK
    return Start(config, source, path, read)


def last_good(
    role: str, model: type[C], path: Path, environ: Mapping[str, str]
) -> tuple[C, bytes] | None:
    """The configuration this daemon was ready with last, if it is still valid and its own: kept in
    the state directory that it names itself."""
    directory = _state_dir(role, path, environ)
    try:
        source = read_source(good_path(directory, role))
        config = parse_config(model, source, environ)
    except InvalidConfigError:
        return None
    return (config, source) if config.state_dir == directory else None


def _state_dir(role: str, path: Path, environ: Mapping[str, str]) -> Path:
    """Where a wrong file would have the state kept, as far as it can be read."""
    given: object = environ.get(f"INTENTD_{role.upper()}__STATE_DIR")
    if not given:
        try:
            given = tomllib.loads(path.read_text()).get("state_dir")
        except (OSError, ValueError, RecursionError):  # broken TOML: its lines may still tell
            given = _line_of(path, "state_dir")
    return Path(given) if isinstance(given, str) and given else default_state_dir()


def _line_of(path: Path, name: str) -> object:
    """A setting of the top level in a file that is no TOML any more."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.lstrip().startswith("["):
            return None
        if line.partition("=")[0].strip() == name:
            try:
                return tomllib.loads(line).get(name)
            except ValueError:
                return None
    return None


def _parse_arguments(role: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"intentd-{role}", description=f"The {role} daemon of intentd.", allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file (default: {default_config_path(role)} if it exists, else the defaults)",
    )
    parser.add_argument(
        "--check-config", action="store_true", help="validate the configuration and exit"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="do not start with the last good configuration when the file is wrong",
    )
    parser.add_argument("--version", action="version", version=f"intentd {intentd.__version__}")
    return parser.parse_args(argv)
