"""A dead-man process: when the agent dies without a word, the devices are given back.

A shell that blocks in ``read`` on a pipe whose other end only the agent holds: .3 MB (measured:
PSS), where an interpreter would cost 8. A line says that the agent stopped in order; end of file
says that it died, and the shell becomes the restoration. It has a session of its own and ignores
the signals that a terminal or a service manager sends to the whole group.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

SHELL: Final = "/bin/sh"
SCRIPT: Final = 'trap "" HUP INT TERM; read -r line || exec "$@"'
STOP_TIMEOUT_S: Final = 5.0


class Guard:
    """States: off (no process), armed (it waits), fired or gone (armed() is False again)."""

    def __init__(self, state_path: Path) -> None:
        self._command = [
            sys.executable,
            "-m",
            "intentd.agent.tc.restore",
            "--state",
            os.fspath(state_path.absolute()),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def armed(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def arm(self) -> None:
        """Start the process unless it runs. It lives in the calling thread's namespace.

        Raises OSError where the machine has no shell.
        """
        if self.armed:
            return
        self.disarm()
        # Path entries that are not absolute ("src") would mean another place after a chdir.
        search = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [SHELL, "-c", SCRIPT, "intentd-tc-guard", *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": search},
        )

    def disarm(self) -> None:
        """Tell the process that all is in order, and wait for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"stopped\n")
            process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
