"""Congestion control of the testbed: asked for, or the host's own where it is not allowed."""

from __future__ import annotations

import socket

import pytest

from intentd.testbed.traffic.congestion import congestion_in_use, set_congestion


class Forbidding(socket.socket):
    """A socket of a user who may set no algorithm."""

    def setsockopt(self, *arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")


def test_what_is_not_allowed_leaves_the_hosts_own() -> None:
    with Forbidding() as sock, socket.socket() as untouched:
        assert set_congestion(sock, "cubic") == set_congestion(untouched, "")


def test_what_is_allowed_is_set() -> None:
    assert congestion_in_use("reno") == "reno"  # every kernel has it, and allows it


def test_an_unknown_name_is_an_error() -> None:
    with socket.socket() as sock, pytest.raises(OSError):
        set_congestion(sock, "nosuch")
