"""Which store a controller works on: its own file, held alone, or a database it may lead on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from intentd.controller.config import ControllerConfig
from intentd.controller.policies import MIGRATIONS
from intentd.core.errors import IntentdError
from intentd.daemons.kit.config import database_password
from intentd.daemons.kit.lifecycle import Kit
from intentd.daemons.kit.locks import LockHeldError, hold_lock

if TYPE_CHECKING:
    from intentd.controller.leader import Leadership


def leadership_of(config: ControllerConfig, kit: Kit) -> Leadership:
    """Not yet asked for. Raises ConfigError, IntentdError without the driver."""
    password = database_password(config.store.password_env)
    try:
        from intentd.controller.leader import Leadership, Me
    except ImportError as error:
        raise IntentdError(
            f"store.url: {error.name} is not installed: pip install 'intentd[controller-postgres]'"
        ) from None
    return Leadership(
        config.store.url,
        password=password,
        timeout_s=config.store.timeout_s,
        lease_s=config.store.lease_s,
        me=Me(config.name, config.host, config.hub.bind, kit.boot),
        clock=kit.clock,
        migrations=MIGRATIONS,
    )


def claim(store: Path) -> int:
    """Hold the store for this process; the descriptor to close. Raises IntentdError."""
    path = store.with_name(store.name + ".lock")
    try:
        return hold_lock(path)
    except LockHeldError as error:
        raise IntentdError(
            f"state_dir: {store} is in use by process {error.owner}: one controller a store; "
            "a pair needs store.url"
        ) from None
