"""Puts itself under a unit's restrictions, then runs a program: what systemd would do, by hand.

    sandbox.py UNIT PROGRAM [ARGUMENT...]

Memory that is writable is never executable (PR_SET_MDWE, where the unit says
MemoryDenyWriteExecute=), system calls outside the unit's SystemCallFilter= fail with EPERM
(libseccomp), no new privileges. User, capabilities and the
read-only file system are the caller's part (setpriv, unshare). Prints what it applied. Not a test.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38
PR_SET_MDWE = 65
PR_MDWE_REFUSE_EXEC_GAIN = 1
SCMP_ACT_ALLOW = 0x7FFF0000
SCMP_ACT_ERRNO = 0x00050000


def members(group: str) -> set[str]:
    """System calls of one of systemd's groups, its sub-groups included; a call is itself."""
    if not group.startswith("@"):
        return {group}
    text = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", group],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = {line.strip() for line in text.splitlines()[1:] if not line.strip().startswith("#")}
    found = {word for word in words if re.fullmatch(r"[a-z0-9_]+", word)}
    for inner in words:
        if inner.startswith("@"):
            found |= members(inner)
    return found


def permitted(unit: Path) -> set[str]:
    allowed: set[str] = set()
    for line in unit.read_text().splitlines():
        if not line.startswith("SystemCallFilter="):
            continue
        value = line.partition("=")[2]
        for group in value.removeprefix("~").split():
            if value.startswith("~"):
                allowed -= members(group)
            else:
                allowed |= members(group)
    return allowed


def restrict_calls(names: set[str]) -> None:
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    library.seccomp_rule_add.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint,
    ]  # fmt: skip
    context = library.seccomp_init(SCMP_ACT_ERRNO | errno.EPERM)
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            library.seccomp_rule_add(context, SCMP_ACT_ALLOW, number, 0)
    if library.seccomp_load(context) != 0:
        raise OSError("seccomp_load failed")


def main() -> None:
    unit, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    applied = ["no_new_privs"]
    allowed = permitted(Path(unit))
    # Python's own ctypes is done with by now; the program starts afresh under both.
    never_executable = "MemoryDenyWriteExecute=yes" in Path(unit).read_text().splitlines()
    if never_executable and libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0:
        applied.append("mdwe")
    try:
        restrict_calls(allowed)
        applied.append("seccomp")
    except OSError as error:
        print(f"sandbox: no seccomp: {error}", file=sys.stderr)
    print("sandbox:", " ".join(applied), file=sys.stderr, flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
