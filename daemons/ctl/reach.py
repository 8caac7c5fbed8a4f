"""How intentctl finds the daemons of this machine: their admin sockets in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from intentd.core.messages import ROLES
from intentd.daemons.kit.admin import AdminClient
from intentd.daemons.kit.config import admin_path, default_run_dir

TIMEOUT_S: Final = 10.0


def admin_client(role: str, *, timeout_s: float = TIMEOUT_S) -> AdminClient:
    """The client of a role's admin socket in the run directory ($RUNTIME_DIRECTORY overrides)."""
    return AdminClient(admin_path(role), timeout_s)


def admin_sockets(run_dir: Path | None = None) -> dict[str, Path]:
    """role -> socket, for the sockets that exist; a daemon that was killed leaves its file."""
    where = run_dir or default_run_dir()
    paths = {role: admin_path(role, where) for role in ROLES}
    return {role: path for role, path in paths.items() if path.exists()}


def running_roles() -> list[str]:
    return list(admin_sockets())
