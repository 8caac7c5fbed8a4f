"""``intentctl up`` and ``down``: the whole suite on this machine, from one terminal.

``up`` starts controller, sequencer, agent, GPU scheduler and, where there is a model for it, proxy
as children with embedded defaults, restarts one that dies, and stops all at Ctrl-C. ``--detach``
leaves a supervisor with them behind; ``down`` stops what it recorded (process id and start time),
and nothing else; jobs go on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from intentd.agent.client import DEFAULT_SOCKET
from intentd.core.errors import ConfigError, IntentdError
from intentd.daemons.ctl.daemon import DAEMONS
from intentd.daemons.ctl.output import ExitCode, JsonOption, fail, message, print_json
from intentd.daemons.ctl.supervisor import Child, Layout, Supervisor, alive, read_record
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.config import admin_path, default_run_dir, default_state_dir

app = typer.Typer(add_completion=False)

READY_TIMEOUT_S: Final = 60.0
DOWN_TIMEOUT_S: Final = 30.0
RESTART_TIMEOUT_S: Final = 120.0
ROLES: Final = ("controller", "sequencer", "agent", "gpu")

RunDirOption = Annotated[
    Path | None, typer.Option(help="Sockets, lock and record. Default: the usual run directory.")
]


@app.command()
def up(
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the suite running; intentctl down stops it.")
    ] = False,
    main_job: Annotated[
        bool, typer.Option("--main-job", help="Run the testbed's main job once the suite is ready.")
    ] = False,
    oneshot: Annotated[
        bool, typer.Option("--oneshot", help="Stop everything when the main job is done.")
    ] = False,
    run_dir: RunDirOption = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Default: the directory 'up' in the usual state directory.")
    ] = None,
    config_dir: Annotated[
        Path | None, typer.Option(help="Directory with ROLE.toml files, instead of the defaults.")
    ] = None,
    port_base: Annotated[
        int, typer.Option(help="First of the ports the suite takes.", min=1024, max=65000)
    ] = 7400,
    out_dir: Annotated[Path, typer.Option(help="Where the main job writes.")] = Path("results/up"),
    live: Annotated[
        bool, typer.Option("--live", help="A light load of flows, jobs and prompts beside it.")
    ] = False,
    small_model: Annotated[
        Path | None,
        typer.Option(
            help="A model server (examples/small_model/server.py) to run behind the proxy.",
            exists=True,
            dir_okay=False,
            resolve_path=True,
        ),
    ] = None,
    supervise: Annotated[bool, typer.Option("--supervise", hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Start the suite on this machine."""
    layout = Layout(
        run_dir or default_run_dir(),
        state_dir or default_state_dir() / "up",
        config_dir,
        port_base,
        live,
        small_model,
    )
    if supervise:
        raise typer.Exit(asyncio.run(_keep(layout, as_json=False, announce=False)))
    _refuse_second(layout)
    if detach or oneshot:
        _up_detached(layout, main_job or oneshot, oneshot, out_dir, as_json)
        return
    job = _job(out_dir, oneshot=False) if main_job else None
    raise typer.Exit(asyncio.run(_keep(layout, as_json=as_json, announce=True, job=job)))


@app.command()
def down(run_dir: RunDirOption = None, as_json: JsonOption = False) -> None:
    """Stop the suite that ``up`` left running."""
    layout = Layout(run_dir or default_run_dir(), default_state_dir() / "up", None, 7400)
    stopped = _stop_recorded(layout)
    if as_json:
        print_json({"stopped": stopped})
    elif stopped:
        print(f"stopped {', '.join(stopped)}")
    else:
        print("nothing to stop")


@app.command()
def restart(
    role: Annotated[str, typer.Argument(help="controller, sequencer, agent, gpu or proxy")],
    run_dir: RunDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Restart one daemon of the suite that ``up`` runs, and wait until it is ready.

    Its sockets are held meanwhile: what comes waits. Under systemd: systemctl restart.
    """
    if role not in DAEMONS:
        raise ConfigError("role", role, f"one of {', '.join(DAEMONS)}")
    layout = Layout(run_dir or default_run_dir(), default_state_dir() / "up", None, 7400)
    record = read_record(layout.record)
    if record is None or not alive(record["supervisor"]):
        raise IntentdError(
            f"no suite of intentctl up runs in {layout.run_dir}; "
            f"under systemd: systemctl restart intentd-{role}"
        )
    child: Child | None = record.get("children", {}).get(role)
    if child is None or not alive(child):
        raise IntentdError(f"{role}: does not run; its supervisor starts it again")
    began = time.monotonic()
    os.kill(child["pid"], signal.SIGTERM)
    status = _wait_for_another(layout, role, child)
    took_s = round(time.monotonic() - began, 3)
    if as_json:
        print_json({"role": role, "pid": status["pid"], "took_s": took_s, "ready": True})
    else:
        print(f"{role}: restarted in {took_s:.1f} s, process {status['pid']}")


def _wait_for_another(layout: Layout, role: str, child: Child) -> dict[str, Any]:
    """The status of the process that follows child, once it is ready."""
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    reasons = "no answer"
    while time.monotonic() < deadline:
        try:
            status = AdminClient(admin_path(role, layout.run_dir), 5.0).call("status")
        except (AdminUnreachableError, AdminRefusedError) as error:
            reasons = str(error)
        else:
            if status["pid"] != child["pid"] and status["ready"]:
                return status
            reasons = "; ".join(status["reasons"]) or "the old process still runs"
        time.sleep(0.05)
    raise IntentdError(f"{role}: not ready after {RESTART_TIMEOUT_S:.0f} s: {reasons}")


def _refuse_second(layout: Layout) -> None:
    record = read_record(layout.record)
    if record is not None and alive(record["supervisor"]):
        raise IntentdError(
            f"the suite runs already (process {record['supervisor']['pid']}, "
            f"status at {record.get('status_address', '?')}): intentctl down stops it"
        )


def _roles(layout: Layout) -> tuple[str, ...]:
    """The proxy only where it has a model to ask: without one it would never be ready."""
    asked = layout.small_model is not None or layout.config_of("proxy") is not None
    return (*ROLES, "proxy") if asked else ROLES


async def _keep(layout: Layout, *, as_json: bool, announce: bool, job: Any = None) -> int:
    """Run the suite in this process until a signal; exit status of the command."""
    supervisor = Supervisor(layout, _roles(layout), DAEMONS, sys.stderr)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    errors: list[BaseException] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(supervisor.run(), name="supervisor")
            try:
                await _until_ready(supervisor, stop)
                if announce and not stop.is_set():
                    _announce(supervisor, as_json)
                if job is not None and not stop.is_set():
                    await _job_or_stop(job, stop, as_json)
                await stop.wait()
            finally:
                if job is not None:
                    job.close()  # nothing, unless it never began
                running.cancel()
                await asyncio.wait({running})
                await supervisor.stop()
    except* IntentdError as group:
        errors += group.exceptions
    for error in errors:
        message(f"intentctl: {error}")
    return int(ExitCode.FAILED if errors else ExitCode.OK)


async def _until_ready(supervisor: Supervisor, stop: asyncio.Event) -> None:
    ready = asyncio.ensure_future(supervisor.ready(READY_TIMEOUT_S))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
    finally:
        ready.cancel()
        stopped.cancel()


async def _job_or_stop(job: Any, stop: asyncio.Event, as_json: bool) -> None:
    """The main job, ended early by a signal."""
    working = asyncio.ensure_future(job)
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait({working})
        return
    _print_job(working.result(), as_json)


def _job(out_dir: Path, *, oneshot: bool) -> Any:
    """The coroutine of the testbed's main job. Raises IntentdError when it is not installed."""
    try:
        from intentd.testbed import main_job
    except ImportError as error:
        raise IntentdError(
            f"main job: {error.name} is not installed (pip install 'intentd[testbed]')"
        ) from None
    return main_job.run(root=os.geteuid() == 0, oneshot=oneshot, out_dir=out_dir, progress=message)


def _print_job(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    print(result["table"])
    for note in result["notes"]:
        print(note)
    print(f"report: {result['report']}")


def _announce(supervisor: Supervisor, as_json: bool) -> None:
    addresses = supervisor.addresses()
    if as_json:
        print_json(_told(supervisor.layout, addresses))
        return
    message(f"intentd runs; status at http://{addresses['controller']}/status (Ctrl-C stops it)")
    _say_console(supervisor.layout, addresses)
    _say_socket(supervisor.layout)


def _told(layout: Layout, addresses: dict[str, str]) -> dict[str, Any]:
    return {
        "status": addresses,
        "run_dir": str(layout.run_dir),
        "console": f"http://{addresses['controller']}/console/",
        "console_token_file": layout.way_in(),
    }


def _say_console(layout: Layout, addresses: dict[str, str]) -> None:
    message(f"console at http://{addresses['controller']}/console/ (reading is free)")
    if layout.way_in():
        message(f"to change things log in with the token in {layout.way_in()}")


def _say_socket(layout: Layout) -> None:
    """How applications find the agent, where it is not where they look by themselves."""
    path = layout.run_dir / "agent.sock"
    if str(path) != DEFAULT_SOCKET and layout.config_of("agent") is None:
        message(f"applications find it with: export INTENTD_SOCKET={path}")


# -- detached ------------------------------------------------------------------------------------


def _up_detached(
    layout: Layout, main_job: bool, oneshot: bool, out_dir: Path, as_json: bool
) -> None:
    """Start a supervisor of its own session, wait until ready, run the job in the foreground."""
    # Made before anything starts: a missing extra must not leave a suite running.
    job = _job(out_dir, oneshot=oneshot) if main_job else None
    process = _start_supervisor(layout)
    try:
        record = _wait_for_record(layout, process)
        addresses = record["addresses"]
        if job is not None:
            _print_job(asyncio.run(_await(job)), as_json)
    except BaseException:
        if job is not None:
            job.close()
        _stop_recorded(layout)
        process.wait(DOWN_TIMEOUT_S)
        raise
    if oneshot:
        _stop_recorded(layout)
        process.wait(DOWN_TIMEOUT_S)
        return
    if as_json and not main_job:
        print_json(_told(layout, addresses))
    message(f"intentd runs; status at http://{addresses['controller']}/status")
    _say_console(layout, addresses)
    message("intentctl status shows it, intentctl down stops it")
    _say_socket(layout)


async def _await(job: Any) -> Any:
    return await job


def _start_supervisor(layout: Layout) -> subprocess.Popen[bytes]:
    layout.prepare()
    command = [sys.executable, "-m", "intentd.daemons.ctl", "up", "--supervise"]
    command += [f"--run-dir={layout.run_dir}", f"--state-dir={layout.state_dir}"]
    command += [f"--port-base={layout.port_base}"]
    if layout.config_dir is not None:
        command.append(f"--config-dir={layout.config_dir}")
    if layout.live:
        command.append("--live")
    if layout.small_model is not None:
        command.append(f"--small-model={layout.small_model}")
    layout.record.unlink(missing_ok=True)
    with layout.log.open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _wait_for_record(layout: Layout, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + READY_TIMEOUT_S + 5
    while time.monotonic() < deadline:
        record = read_record(layout.record)
        if record is not None and record.get("ready"):
            return record
        if process.poll() is not None:
            tail = layout.log.read_text(errors="replace").splitlines()[-8:]
            fail("the suite did not start:\n  " + "\n  ".join(tail))
        time.sleep(0.1)
    raise IntentdError(f"the suite is not ready after {READY_TIMEOUT_S:.0f} s, see {layout.log}")


def _stop_recorded(layout: Layout) -> list[str]:
    """Stop supervisor, then any child that outlived it. Only what was recorded and still is it."""
    record = read_record(layout.record)
    if record is None:
        return []
    stopped = []
    supervisor: Child = record["supervisor"]
    children: dict[str, Child] = record.get("children", {})
    if alive(supervisor):
        os.kill(supervisor["pid"], signal.SIGTERM)
        stopped.append("supervisor")
        _wait_gone(supervisor)
        stopped += list(children)
    for role, child in children.items():
        if alive(child):
            os.kill(child["pid"], signal.SIGTERM)
            if role not in stopped:
                stopped.append(role)
            _wait_gone(child)
    layout.record.unlink(missing_ok=True)
    return stopped


def _wait_gone(child: Child) -> None:
    """Wait for the end; force it when it takes too long."""
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    while alive(child):
        if time.monotonic() > deadline:
            os.kill(child["pid"], signal.SIGKILL)
            return
        time.sleep(0.05)
