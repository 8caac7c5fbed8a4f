"""The agent's configuration file (docs/operations.md, "Agent")."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import Field, model_validator

from intentd.agent.app_socket import SocketLimits
from intentd.core.errors import ConfigError, PolicyError
from intentd.core.flows.policy import (
    MAX_DOMAINS,
    ClassPolicy,
    DomainPolicy,
    domain_from_plain,
)
from intentd.daemons.kit.config import (
    ZMQ_ADDRESS_OR_NONE,
    DaemonConfig,
    Duration,
    Rate,
    Section,
    check_link_security,
    split_address,
)

FIN_PORT: Final = 7430


class SocketSection(Section):
    """The Unix socket applications open flows on."""

    path: str = Field(default="", description="Socket path. Empty: <run_dir>/agent.sock.")
    mode: str = Field(
        default="0666",
        description="Permissions of the socket file (octal): who may ask for turns.",
        pattern="^0?[0-7]{3}$",
    )
    allow_uids: tuple[int, ...] = Field(
        default=(), description="Only these user ids may connect (root always). Empty: all."
    )
    allow_class_hints: bool = Field(
        default=True, description="Applications may name their flow's class; else size decides."
    )
    board: bool = Field(
        default=True,
        description="Show applications which classes are free, in memory that only the agent "
        "writes: a flow of a free class then starts without asking first.",
    )
    max_connections: int = Field(
        default=4096, description="Applications connected at a time.", ge=1, le=1_000_000
    )
    max_flows_per_connection: int = Field(
        default=16384, description="Open flows of one connection.", ge=1, le=1_000_000
    )
    send_backlog: int = Field(
        default=4096,
        description="Packets kept for an application that does not read; then it is cut off.",
        ge=16,
        le=1_000_000,
    )

    def limits(self) -> SocketLimits:
        return SocketLimits(
            max_connections=self.max_connections,
            max_flows_per_connection=self.max_flows_per_connection,
            send_backlog=self.send_backlog,
        )


class FinSection(Section):
    """Finished-id datagrams of the turn protocol, for domains that name a sequencer."""

    bind: str = Field(
        default=f"0.0.0.0:{FIN_PORT}",
        description="address:port to hear finished ids on; port 0 takes a free one.",
    )
    key_file: str = Field(
        default="",
        description="Shared key of the datagrams' MAC (intentctl keys fin). Empty: none are sent "
        "or heard, and agents learn whose turn it is by asking the sequencer.",
    )
    interface: str = Field(
        default="", description="Local address multicast goes out by. Empty: the system's choice."
    )

    @model_validator(mode="after")
    def _check(self) -> FinSection:
        split_address(self.bind, "bind")
        return self


class SequencerSection(Section):
    """Where a domain's ids come from. Without an endpoint its order is local to this host."""

    endpoint: str = Field(
        default="",
        description="ZeroMQ address of the domain's sequencer. Empty: local order only.",
        pattern=ZMQ_ADDRESS_OR_NONE,
    )
    key_file: str = Field(
        default="", description="This agent's CURVE key pair. Empty: no encryption."
    )
    server_key_file: str = Field(default="", description="The sequencer's public CURVE key.")
    fin_addresses: tuple[str, ...] = Field(
        default=(),
        description="address:port finished ids are sent to: a broadcast or multicast address that "
        "reaches agents and sequencer, or each of them.",
    )

    @model_validator(mode="after")
    def _check(self) -> SequencerSection:
        if bool(self.key_file) != bool(self.server_key_file):
            raise ConfigError(
                "server_key_file", self.server_key_file, "key_file and server_key_file together"
            )
        check_link_security(self.endpoint, keyed=bool(self.key_file), where="endpoint")
        for index, address in enumerate(self.fin_addresses):
            host, _ = split_address(address, f"fin_addresses[{index}]")
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ConfigError(
                    f"fin_addresses[{index}]", address, "an IP address and port"
                ) from None
        return self


class DomainSection(Section):
    """A link domain: a bottleneck link with its own policy, order and queues."""

    name: str = Field(description="The domain's name, the same on all its hosts.", min_length=1)
    device: str = Field(
        default="",
        description="Network device to shape. Empty: flows are ordered and marked, not shaped.",
        max_length=15,
    )
    direction: str = Field(
        default="egress",
        description="egress: the link is this host's uplink; ingress: its downlink (IFB).",
        pattern="^(egress|ingress)$",
    )
    rate_bps: Rate = Field(
        default=1e9,
        description="Capacity of the link until a policy names it, such as 1Gbit.",
        gt=0,
    )
    peers: tuple[str, ...] = Field(
        default=(),
        description="Receivers whose flows pass this link: addresses or networks; the longest "
        "match of all domains wins.",
    )
    default: bool = Field(
        default=False,
        description="Flows without domain and peer match belong here. At most one; the only domain "
        "without peers is it anyway.",
    )
    sequencer: SequencerSection = Field(
        default=SequencerSection(), description="Order across hosts."
    )
    policy: dict[str, Any] = Field(
        default={},
        description="Policy to start with (the fields of a domain policy, docs/wire.md), until the "
        "controller sends one. Empty: one class without a gate.",
    )

    @model_validator(mode="after")
    def _check(self) -> DomainSection:
        for index, peer in enumerate(self.peers):
            try:
                ipaddress.ip_network(peer)
            except ValueError as error:
                expected = f"an address or network ({error})"
                raise ConfigError(f"peers[{index}]", peer, expected) from None
        self.first_policy()
        return self

    def first_policy(self) -> DomainPolicy:
        """What the gate follows until the controller says otherwise. Raises ConfigError."""
        if not self.policy:
            return DomainPolicy(
                self.name, self.rate_bps, (ClassPolicy(float("inf"), 1.0, mpl=0),), name="ps"
            )
        plain = {"domain": self.name, "rate_bps": self.rate_bps, **self.policy}
        try:
            policy = domain_from_plain(plain, "policy")
        except PolicyError as error:
            raise ConfigError(error.field, error.value, error.expected) from None
        if policy.domain != self.name:
            raise ConfigError("policy.domain", policy.domain, f"{self.name} (or leave it out)")
        return policy


class AgentConfig(DaemonConfig):
    """The file of intentd-agent."""

    role: ClassVar[str] = "agent"

    socket: SocketSection = Field(default=SocketSection(), description="The applications' socket.")
    fin: FinSection = Field(default=FinSection(), description="Finished-id datagrams.")
    domains: tuple[DomainSection, ...] = Field(
        default=(DomainSection(name="default", default=True),),
        description="Link domains of this host.",
        max_length=MAX_DOMAINS,
    )
    recent_flows: int = Field(
        default=4096, description="Ended flows that explain still knows.", ge=0, le=1_000_000
    )
    tc_verify_interval_s: Duration = Field(
        default=10.0, description="How often the kernel's classes are read back.", gt=0, le=3600
    )

    @model_validator(mode="after")
    def _check_domains(self) -> AgentConfig:
        names: set[str] = set()
        devices: set[tuple[str, str]] = set()
        networks: dict[str, str] = {}
        for index, domain in enumerate(self.domains):
            at = f"domains[{index}]"
            if domain.name in names:
                raise ConfigError(f"{at}.name", domain.name, "a name used once")
            names.add(domain.name)
            device = (domain.device, domain.direction)
            if domain.device and device in devices:
                raise ConfigError(f"{at}.device", domain.device, "a device of one domain only")
            devices.add(device)
            for number, peer in enumerate(domain.peers):
                network = str(ipaddress.ip_network(peer))
                if network in networks:
                    expected = f"a network of one domain (it is in {networks[network]})"
                    raise ConfigError(f"{at}.peers[{number}]", peer, expected)
                networks[network] = domain.name
        if sum(domain.default for domain in self.domains) > 1:
            raise ConfigError("domains[*].default", "two", "at most one default domain")
        return self

    @property
    def socket_path(self) -> Path:
        return Path(self.socket.path) if self.socket.path else self.run_dir / "agent.sock"

    @property
    def default_domain(self) -> str:
        """The domain marked default; the only one without peers needs no mark."""
        for domain in self.domains:
            if domain.default:
                return domain.name
        rest = [domain.name for domain in self.domains if not domain.peers]
        return rest[0] if len(rest) == 1 else ""
