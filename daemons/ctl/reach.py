"""How intentctl finds the daemons of this machine: their admin sockets in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from intentd.core.messages import ROLES
from intentd.daemons.kit.admin import AdminClient
from intentd.daemons.kit.config import admin_path, default_run_dir

TIMEOUT_S: Final = 10.0
SYSTEM_RUN_DIR: Final = Path("/run/intentd")


def admin_client(role: str, *, timeout_s: float = TIMEOUT_S) -> AdminClient:
    """The client of a role's admin socket; see run_dir."""
    return AdminClient(admin_path(role, run_dir()), timeout_s)


def run_dir() -> Path:
    """$RUNTIME_DIRECTORY if set, else this user's; the system's where only that has sockets."""
    own = default_run_dir()
    if own != SYSTEM_RUN_DIR and not admin_sockets(own) and admin_sockets(SYSTEM_RUN_DIR):
        return SYSTEM_RUN_DIR
    return own


def admin_sockets(where: Path) -> dict[str, Path]:
    """role -> socket, for the sockets that exist; a daemon that was killed leaves its file."""
    paths = {role: admin_path(role, where) for role in ROLES}
    return {role: path for role, path in paths.items() if path.exists()}


def running_roles() -> list[str]:
    return list(admin_sockets(run_dir()))
