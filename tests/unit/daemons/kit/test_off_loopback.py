"""Beyond this machine nothing is listened on or connected to without keys: one clear error each."""

from __future__ import annotations

import pytest

from intentd.daemons.ctl.daemon import DAEMONS, daemon_class
from intentd.daemons.kit.config import InvalidConfigError, parse_config

MEMBERS = [role for role in DAEMONS if role != "controller"]
KEYS = 'key_file = "/k"\nserver_key_file = "/s"\n'


def errors(role: str, toml: str) -> list[str]:
    try:
        parse_config(daemon_class(role).config_model, toml.encode(), {})
    except InvalidConfigError as error:
        return [str(item) for item in error.errors]
    return []


@pytest.mark.parametrize(
    ("role", "toml", "error"),
    [
        (
            "controller",
            '[hub]\nbind = "tcp://0.0.0.0:7400"',
            "hub.bind: got 'tcp://0.0.0.0:7400', expected a loopback address, or key_file set "
            "(CURVE)",
        ),
        (
            "sequencer",
            '[turns]\nbind = "tcp://0.0.0.0:7410"',
            "turns.bind: got 'tcp://0.0.0.0:7410', expected a loopback address, or key_file set "
            "(CURVE)",
        ),
        (
            "sequencer",
            '[fin]\nbind = "0.0.0.0:7412"',
            "fin.key_file: got '', expected a key file, to hear FINs off loopback",
        ),
        (
            "agent",
            '[[domains]]\nname = "up"\n[domains.sequencer]\nendpoint = "tcp://10.0.0.1:7410"',
            "domains[0].sequencer.endpoint: got 'tcp://10.0.0.1:7410', expected a loopback "
            "address, or key_file set (CURVE)",
        ),
        (
            "proxy",
            '[listen]\nbind = "0.0.0.0:7450"',
            "listen.bind: got '0.0.0.0:7450', expected a loopback address, or keys.required = true",
        ),
    ],
)
def test_what_a_role_listens_on_or_asks(role: str, toml: str, error: str) -> None:
    assert errors(role, toml) == [error]


@pytest.mark.parametrize("role", DAEMONS)
def test_the_status_endpoint(role: str) -> None:
    assert errors(role, '[status]\nbind = "0.0.0.0:7499"') == [
        "status.bind: got '0.0.0.0:7499', expected a loopback address, or status.tokens set"
    ]


@pytest.mark.parametrize("role", MEMBERS)
def test_the_link_to_the_controller(role: str) -> None:
    away = '[controller]\nendpoint = ["tcp://127.0.0.1:7400", "tcp://10.0.0.1:7400"]\n'
    assert errors(role, away) == [
        "controller.endpoint: got 'tcp://10.0.0.1:7400', expected a loopback address, or key_file "
        "set (CURVE)"
    ]
    assert errors(role, away + KEYS) == []
