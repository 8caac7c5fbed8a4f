"""Configuration of intentd-sequencer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from intentd.core.errors import ConfigError
from intentd.core.flows.policy import MAX_DOMAINS
from intentd.core.flows.turn.sequencer import SequencerSettings
from intentd.daemons.kit.config import (
    ZMQ_ADDRESS,
    DaemonConfig,
    Duration,
    Section,
    check_link_security,
    is_loopback,
    split_address,
)

TURNS_ENDPOINT = "tcp://127.0.0.1:7410"


class TurnsSection(Section):
    """Where agents ask for their turns."""

    bind: str = Field(
        default=TURNS_ENDPOINT,
        description="ZeroMQ address; off loopback only with key_file.",
        pattern=ZMQ_ADDRESS,
    )
    key_file: str = Field(
        default="", description="The sequencer's CURVE key pair. Empty: no encryption."
    )
    allow_file: str = Field(
        default="",
        description="Public keys of the agents let in, one a line: KEY [ROLE[@NAME]]. "
        "Needed with key_file; read again on reload.",
    )
    domains: tuple[str, ...] = Field(
        default=(),
        description="Link domains served here. Empty: any. Several sequencers share the domains "
        "of a site by naming them.",
    )
    lease_s: Duration = Field(
        default=1.0,
        description="An agent unheard for so long is taken for dead; its turns pass on.",
        ge=0.1,
        le=60,
    )
    heartbeat_s: Duration = Field(
        default=0.16, description="How often agents say that they live.", ge=0.01, le=20
    )
    recover_s: Duration = Field(
        default=1.0,
        description="After a start, how long agents' holdings are collected before turns are "
        "given out; at least lease_s.",
        ge=0.1,
        le=120,
    )
    pause_s: Duration = Field(
        default=5.0,
        description="At a planned restart agents keep what they hold for so long, and wait; 0: "
        "only for what is left of their lease.",
        ge=0,
        le=60,
    )
    max_members: int = Field(
        default=4096, description="Registrations (agents x domains) beyond are refused.", ge=1
    )
    max_domains: int = Field(
        default=MAX_DOMAINS, description="Domains beyond are refused.", ge=1, le=65536
    )

    @model_validator(mode="after")
    def _check(self) -> TurnsSection:
        if bool(self.key_file) != bool(self.allow_file):
            raise ConfigError("allow_file", self.allow_file, "key_file and allow_file together")
        if self.heartbeat_s * 3 > self.lease_s:
            raise ConfigError("heartbeat_s", self.heartbeat_s, "at most a third of lease_s")
        if self.recover_s < self.lease_s:
            raise ConfigError("recover_s", self.recover_s, "at least lease_s")
        for index, name in enumerate(self.domains):
            if not name or len(name) > 64 or not name.isprintable():
                raise ConfigError(f"domains[{index}]", name, "a printable name of 1-64 characters")
        check_link_security(self.bind, keyed=bool(self.key_file), where="bind")
        return self

    def settings(self) -> SequencerSettings:
        return SequencerSettings(
            lease_s=self.lease_s,
            heartbeat_s=self.heartbeat_s,
            recover_s=self.recover_s,
            doubt_s=self.lease_s,
            domains=self.domains,
            max_domains=self.max_domains,
            max_members=self.max_members,
        )


class FinSection(Section):
    """Where finished ids are heard (UDP)."""

    bind: str = Field(
        default="127.0.0.1:7412",
        description="address:port to hear FIN datagrams on; port 0 takes a free one.",
    )
    multicast_group: str = Field(
        default="", description="IPv4 multicast group to join, if FINs are sent to one."
    )
    key_file: str = Field(
        default="",
        description="Shared key of the datagrams' MAC (intentctl keys fin). Empty: none is heard; "
        "agents' heartbeats then say what finished.",
    )

    @model_validator(mode="after")
    def _check(self) -> FinSection:
        host, _ = split_address(self.bind, "bind")
        if not self.key_file and not is_loopback(host):
            raise ConfigError("key_file", "", "a key file, to hear FINs off loopback")
        return self


class SequencerConfig(DaemonConfig):
    """The sequencer's file."""

    role: ClassVar[str] = "sequencer"

    turns: TurnsSection = Field(default=TurnsSection(), description="The turn protocol.")
    fin: FinSection = Field(default=FinSection(), description="FIN datagrams.")
