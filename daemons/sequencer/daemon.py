"""intentd-sequencer: gives out turns (dissertation, section 2.4.4)."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, ClassVar, Final

import zmq

from intentd.core.errors import IntentdError, WireError
from intentd.core.flows.fin import FinVerifier
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.sequencer import SequencerCore
from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.daemons.kit.config import split_address
from intentd.daemons.kit.keys import CurveKeys, read_allow_list, read_curve_keys, read_fin_keys
from intentd.daemons.kit.lifecycle import Daemon, Kit, run_daemon
from intentd.daemons.kit.link import MemberLink
from intentd.daemons.kit.zap import ZapServer, rekey_server, secure_server
from intentd.daemons.sequencer import kept
from intentd.daemons.sequencer.config import SequencerConfig
from intentd.daemons.sequencer.epoch import next_epoch, read_epoch
from intentd.daemons.sequencer.metrics import SequencerCollector
from intentd.daemons.sequencer.server import FinSocket, TurnSocket, bind, open_router

_log = logging.getLogger(__name__)

EPOCH_FILE: Final = "sequencer.epoch"
TURNS_FILE: Final = "sequencer.turns.json"
_TICKS_A_LEASE: Final = 10


class SequencerDaemon(Daemon[SequencerConfig]):
    """One process; its domains' ids live here and nowhere else."""

    role: ClassVar[str] = "sequencer"
    config_model = SequencerConfig
    fixed: ClassVar[tuple[str, ...]] = ("turns", "fin", "controller.enabled")

    def __init__(self, config: SequencerConfig, kit: Kit) -> None:
        super().__init__(config, kit)
        self.core: SequencerCore | None = None
        self.endpoint = ""
        self.resumed = False  # in the epoch, and with the turns, of the process before
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._turns: TurnSocket | None = None
        self._fins: FinSocket | None = None
        self._zap: ZapServer | None = None
        self._allowed: dict[bytes, str] = {}
        self._router: zmq.Socket[bytes] | None = None
        self._keys: CurveKeys | None = None
        self._link: MemberLink | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        self.core = self._begin()
        self._open_fins(self.core)
        self._open_turns(self.core)
        self.kit.metrics.registry.register(SequencerCollector(self.status))
        tasks.create_task(self._tick_for_ever(self.core), name="leases")
        self._link = MemberLink(
            self.config,
            self.kit,
            on_policy=self._on_policy,
            collect_report=lambda: {"turns": self.status()},
            capabilities=lambda: {
                "turns": self.endpoint,
                "domains": list(self.config.turns.domains),
            },
        )
        await self._link.start(tasks)
        _log.info(
            "serving turns",
            extra={
                "endpoint": self.endpoint,
                "epoch": self.core.epoch,
                "before": self.core.previous,
                "resumed": self.resumed,
            },
        )

    async def reload(self, config: SequencerConfig) -> None:
        """Keys, the allow list and the controller; ids and sockets need a restart."""
        allowed = keys = fin_keys = None
        if self._zap is not None:
            allowed = read_allow_list(Path(config.turns.allow_file))
            keys = read_curve_keys(Path(config.turns.key_file))
        if self._fins is not None:
            fin_keys = read_fin_keys(Path(config.fin.key_file))
        if self._link is not None:
            self._link.reconfigure(config.controller)
        if self._zap is not None and allowed is not None:
            self._allowed = allowed
            self._zap.allow(allowed)
        if self._fins is not None and fin_keys is not None:
            self._fins.verifier.set_domain_keys(fin_keys)
        if self._router is not None and keys is not None and keys != self._keys:
            rekey_server(self._router, keys, self.endpoint)
            self._keys = keys
            _log.info("new CURVE key", extra={"public": keys.public.hex()})

    async def drain(self, deadline_s: float) -> None:
        """Answer no more, and leave the turns to the next process. Where there is a service manager
        that holds things for it, agents are told to wait for it."""
        core, turns = self.core, self._turns
        if core is None or turns is None or core.recovering:
            return
        turns.hush()
        if self._fins is not None:
            self._fins.stop()
        pause_s = self.config.turns.pause_s if self.kit.held.capacity else 0.0
        frames = core.pause(self.kit.clock.now(), pause_s) if pause_s else []
        if kept.leave(self.config.state_dir / TURNS_FILE, core, pause_s):
            turns.tell(frames)
            _log.info("turns are kept", extra={"epoch": core.epoch, "told": len(frames)})

    async def stop(self) -> None:
        if self._link is not None:
            await self._link.stop()
        if self._turns is not None:
            self._turns.stop()
        if self._fins is not None:
            self._fins.stop()
        if self._zap is not None:
            self._zap.stop()
        if self._context is not None:
            context, self._context = self._context, None
            await asyncio.get_running_loop().run_in_executor(None, context.term)

    def unready(self) -> list[str]:
        reasons = self._link.unready() if self._link is not None else []
        if self.core is not None and self.core.recovering:
            reasons = [*reasons, "collecting what agents hold of the epoch before"]
        return reasons

    def status(self) -> dict[str, Any]:
        detail: dict[str, Any] = self.core.status() if self.core is not None else {}
        fins = self._fins
        detail["resumed"] = self.resumed
        detail["endpoint"] = self.endpoint
        detail["encrypted"] = bool(self.config.turns.key_file)
        detail["multipart_frames"] = self._turns.multipart if self._turns else 0
        detail["fin"] = {
            "address": "{}:{}".format(*fins.address) if fins else "",
            "accepted": fins.verifier.accepted if fins else 0,
            "senders": len(fins.verifier) if fins else 0,
            "dropped": dict(fins.verifier.dropped) if fins else {},
        }
        return detail

    # -- inside --------------------------------------------------------------------------------

    def _begin(self) -> SequencerCore:
        """The turns of the process before where it left them, else a higher epoch."""
        clock, directory = self.kit.clock, self.config.state_dir
        settings, now = self.config.turns.settings(), clock.now()
        last = read_epoch(directory / EPOCH_FILE)
        try:
            taken = kept.take(directory / TURNS_FILE, settings, last, now)
        except OSError as error:
            raise IntentdError(
                f"{directory / TURNS_FILE}: {error.strerror}; "
                "expected a state directory that can be written"
            ) from None
        self.resumed = taken.core is not None
        if taken.core is not None:
            return taken.core
        epochs = next_epoch(directory / EPOCH_FILE, clock.wall())
        return SequencerCore(
            settings,
            epoch=epochs.current,
            previous=epochs.previous,
            now=now,
            promised_until=taken.promised_until,
        )

    def _open_fins(self, core: SequencerCore) -> None:
        section = self.config.fin
        if not section.key_file:
            return
        fin_keys = read_fin_keys(Path(section.key_file))
        verifier = FinVerifier(fin_keys[0])
        verifier.set_domain_keys(fin_keys)
        self._fins = FinSocket(
            split_address(section.bind, "fin.bind"),
            section.multicast_group,
            verifier,
            core,
            self.kit.clock.now,
        )
        self._fins.start()

    def _open_turns(self, core: SequencerCore) -> None:
        section = self.config.turns
        self._context = zmq.Context()
        router = open_router(self._context, max_peers=section.max_members)
        self._turns = TurnSocket(
            router,
            core.receive,
            self.kit.clock.now,
            admit=self._admit if section.key_file else None,
            known=core.sessions,
        )
        if section.key_file:
            self._allowed = read_allow_list(Path(section.allow_file))
            self._zap = ZapServer(self._context, self._allowed, self.kit.metrics)
            self._zap.start()
            self._keys = read_curve_keys(Path(section.key_file))
            secure_server(router, self._keys)
        self._router = router
        self.endpoint = bind(router, section.bind, "turns.bind")
        self._turns.start()

    def _admit(self, key: bytes, frame: bytes) -> bytes | None:
        """The refusal of a Hello under a name that the key may not use; else None."""
        try:
            hello = wire.decode(frame)
        except WireError:
            return None  # the core counts it
        if not isinstance(hello, wire.Hello):
            return None
        user = self._allowed.get(key)
        role, _, name = (user or "").partition("@")
        if user is not None and role in ("", "agent") and name in ("", hello.name):
            return None
        text = f"this key may register as {user}"[:50] if user else "this key is not listed"
        domain_id = wire.name_id(hello.domain)
        return wire.encode(wire.Error(domain_id, wire.ERROR_NAME, hello.sequence, text))

    async def _tick_for_ever(self, core: SequencerCore) -> None:
        clock = self.kit.clock
        period_s = self.config.turns.lease_s / _TICKS_A_LEASE
        while True:
            await clock.sleep(period_s)
            was = core.counts["expired_members"]
            recovering = core.recovering
            core.tick(clock.now())
            if core.counts["expired_members"] != was:
                _log.warning(
                    "leases ran out", extra={"members": core.counts["expired_members"] - was}
                )
            if recovering and not core.recovering:
                _log.info("collected what agents held", extra={"epoch": core.epoch})

    def _on_policy(self, policy: NumberedPolicy) -> PolicyAck:
        """Policies are for the agents; turns follow from their requests."""
        return PolicyAck(policy.application, policy.era, policy.number, applied=True)


def main() -> int:
    return run_daemon(SequencerDaemon)


if __name__ == "__main__":
    raise SystemExit(main())
