"""The agent's configuration: defaults that run anywhere, and one clear error for each defect."""

from __future__ import annotations

from pathlib import Path

import pytest

from intentd.agent.config import AgentConfig
from intentd.core.flows.policy import UNLIMITED
from intentd.daemons.kit.config import InvalidConfigError, load_config


def load(tmp_path: Path, text: str) -> AgentConfig:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return load_config(AgentConfig, path, {})


def test_without_a_file_one_domain_orders_nothing_until_a_policy_comes() -> None:
    config = load_config(AgentConfig, None, {})
    policy = config.domains[0].first_policy()
    assert config.default_domain == "default"
    assert [cls.mpl for cls in policy.classes] == [UNLIMITED]
    assert config.socket_path == config.run_dir / "agent.sock"


def test_the_only_domain_without_peers_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, '[[domains]]\nname = "a"\n').default_domain == "a"
    only_peers = '[[domains]]\nname = "a"\npeers = ["10.0.0.0/8"]\n'
    assert load(tmp_path, only_peers).default_domain == ""
    assert load(tmp_path, only_peers + '[[domains]]\nname = "b"\n').default_domain == "b"


def test_a_starting_policy_takes_the_domains_name_and_rate(tmp_path: Path) -> None:
    text = (
        '[[domains]]\nname = "a"\nrate_bps = "10Gbit"\n[domains.policy]\nname = "fifo"\n'
        "classes = [{threshold_bytes = inf, weight = 1}]\n"
    )
    policy = load(tmp_path, text).domains[0].first_policy()
    assert (policy.domain, policy.rate_bps, policy.name) == ("a", 1e10, "fifo")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[[domains]]\nname = "a"\nrate_bps = "fast"\n', "domains[0].rate_bps: got 'fast'"),
        ('[[domains]]\nname = "a"\nrate_bps = 0\n', "domains[0].rate_bps: got 0"),
        ('[[domains]]\ndevice = "eth0"\n', "domains[0].name: got None"),
        (
            '[[domains]]\nname = "a"\nsequencer = {endpoint = "nowhere"}\n',
            "domains[0].sequencer.endpoint: got 'nowhere'",
        ),
        (
            '[[domains]]\nname = "a"\nsequencer = {fin_addresses = ["here:1"]}\n',
            "domains[0].sequencer.fin_addresses[0]: got 'here:1', expected an IP address and port",
        ),
        ('[fin]\nbind = "7430"\n', "fin.bind: got '7430', expected address:port"),
        ('[socket]\nmode = "rw"\n', "socket.mode: got 'rw'"),
        (
            '[[domains]]\nname = "a"\ndevice = "e0"\n[[domains]]\nname = "b"\ndevice = "e0"\n',
            "domains[1].device: got 'e0', expected a device of one domain only",
        ),
        (
            '[[domains]]\nname = "a"\npeers = ["10.0.0.1"]\n'
            '[[domains]]\nname = "b"\npeers = ["10.0.0.1/32"]\n',
            "domains[1].peers[0]: got '10.0.0.1/32', expected a network of one domain",
        ),
        (
            '[[domains]]\nname = "a"\n[domains.policy]\n'
            "classes = [{threshold_bytes = inf, weight = 0.9}]\n",
            "domains[0].policy.classes[*].weight: got 0.9, expected weights that sum to 1",
        ),
        (
            '[[domains]]\nname = "a"\n[domains.policy]\n'
            "classes = [{threshold_bytes = inf, weight = 1, mpl = -1}]\n",
            "domains[0].policy.classes[0].mpl: got -1",
        ),
        (
            '[[domains]]\nname = "a"\n[domains.policy]\ndomain = "b"\n'
            "classes = [{threshold_bytes = inf, weight = 1}]\n",
            "domains[0].policy.domain: got 'b', expected a (or leave it out)",
        ),
    ],
)
def test_defects_are_named_with_their_path(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        load(tmp_path, text)
    assert error in str(caught.value)
