"""The admin socket: credentials, bounds, and any bytes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import IntentdError
from intentd.daemons.kit.admin import (
    MAX_REQUEST_BYTES,
    AdminClient,
    AdminRefusedError,
    AdminServer,
    AdminUnreachableError,
    decode_request,
)
from intentd.daemons.kit.config import DaemonConfig
from intentd.daemons.kit.lifecycle import Daemon, Kit, Lifecycle, Tasks
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.starting import Start


async def handler(command: str, args: dict[str, Any]) -> dict[str, Any]:
    match command:
        case "echo":
            return args
        case "refuse":
            raise IntentdError("because")
        case "break":
            raise RuntimeError("a defect")
    raise AdminRefusedError(f"command {command!r}: unknown", "unknown_command")


class Served:
    """A server in a loop, for one test."""

    def __init__(self, path: Path) -> None:
        self.server = AdminServer(path, "", handler, Metrics())
        self.tasks = Tasks()

    async def __aenter__(self) -> Served:
        await self.tasks.__aenter__()
        await self.server.start(self.tasks)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.server.stop()
        self.tasks.cancel_all()
        await self.tasks.__aexit__(None, None, None)


async def test_answers_refusals_and_defects(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with Served(path):
        assert path.stat().st_mode & 0o777 == 0o660
        client = AdminClient(path)
        assert await client.acall("echo", x=1) == {"x": 1}
        with pytest.raises(AdminRefusedError, match="because"):
            await client.acall("refuse")
        with pytest.raises(AdminRefusedError, match="RuntimeError: a defect"):
            await client.acall("break")
        with pytest.raises(AdminRefusedError, match="unknown") as caught:
            await client.acall("nope")
        assert caught.value.code == "unknown_command"
        assert await asyncio.to_thread(client.call, "echo", y=[1]) == {"y": [1]}
        big = "x" * (MAX_REQUEST_BYTES // 2)
        assert await client.acall("echo", x=big) == {"x": big}
    with pytest.raises(AdminUnreachableError, match="No such file"):
        await client.acall("echo")
    with pytest.raises(AdminUnreachableError, match="No such file"):
        client.call("echo")


async def test_an_endless_request_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with Served(path) as served:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"x" * (MAX_REQUEST_BYTES * 3))
        answer = json.loads(await reader.readline())
        assert answer["code"] == "bad_request"
        writer.close()
        assert await AdminClient(path).acall("echo") == {}
        assert served.server._open <= 1


async def test_a_stale_socket_is_replaced_and_a_long_path_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    async with Served(path):
        assert await AdminClient(path).acall("echo") == {}
    with pytest.raises(IntentdError, match="107 bytes"):
        await AdminServer(tmp_path / ("x" * 120), "", handler, Metrics()).start(Tasks())


def test_who_is_permitted(tmp_path: Path) -> None:
    server = AdminServer(tmp_path / "a", "", handler, Metrics())
    assert server.permitted(0, 0, frozenset())
    assert server.permitted(os.geteuid(), 99999, frozenset())
    assert not server.permitted(54321, 0, frozenset({0}))
    server = AdminServer(tmp_path / "a", "root", handler, Metrics())
    assert server.permitted(54321, 0, frozenset())
    assert server.permitted(54321, 54321, frozenset({7, 0}))
    assert not server.permitted(54321, 54321, frozenset({7}))
    with pytest.raises(IntentdError, match="expected a group"):
        AdminServer(tmp_path / "a", "no-such-group-here", handler, Metrics())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_another_user_is_denied(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with Served(path):
        path.chmod(0o666)
        for parent in (tmp_path, *tmp_path.parents[:3]):
            parent.chmod(parent.stat().st_mode | 0o011)
        process = await asyncio.create_subprocess_exec(
            "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c",
            "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            "print(s.recv(4096).decode())", str(path),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(30):
            output, _ = await process.communicate()
        assert json.loads(output)["code"] == "denied"


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    with pytest.raises(AdminRefusedError):
        decode_request(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["command", "args", "x"]), _JSON))
def test_any_object_is_a_request_or_refused(request_: dict[str, Any]) -> None:
    try:
        command, args = decode_request(json.dumps(request_).encode())
    except AdminRefusedError:
        return
    assert request_["command"] == command
    assert isinstance(args, dict)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(AdminRefusedError):
        decode_request(b'{"command":"x","args":' + b"[" * 500_000)


class Keeper(Daemon[DaemonConfig]):
    """A role of which one command changes something."""

    role = "proxy"
    config_model = DaemonConfig
    audited = frozenset({"keys.new"})

    async def admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        if args.get("name") == "":
            raise AdminRefusedError("name: got ''", "bad_request")
        return {"did": command}


async def test_commands_that_change_a_role_are_noted_for_the_audit_log(tmp_path: Path) -> None:
    config = DaemonConfig(state_dir=tmp_path, run_dir=tmp_path)
    kit = Kit("proxy")
    lifecycle = Lifecycle(Keeper, Start(config, b"", None, lambda: (config, b"")), kit)
    assert await lifecycle.handle_admin("keys.new", {"name": "ann"}) == {"did": "keys.new"}
    assert await lifecycle.handle_admin("keys", {"name": "ann"}) == {"did": "keys"}
    with pytest.raises(AdminRefusedError):
        await lifecycle.handle_admin("keys.new", {"name": ""})
    told = [(row["via"], row["action"], row["about"], row["result"])
            for row in kit.changes.to_plain()]  # fmt: skip
    assert told == [
        ("admin", "keys.new", "ann", "done"),
        ("admin", "keys.new", "", "refused: name: got ''"),
    ]
