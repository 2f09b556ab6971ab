"""A command on a terminal of its own, at which Ctrl-C is pressed: every process in its foreground gets the signal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PATIENCE = 300.0  # seconds
CTRL_C = b"\x03"


class Ended(NamedTuple):
    status: int
    lines: list[str]  # shown after the first Ctrl-C, without escape sequences and what a progress bar shows
    left: list[str]  # command lines of processes that are still there


def press_ctrl_c(command: Sequence[str], until: str, *, times: int = 1, cwd: Path, **environment: str) -> Ended:
    """Run a command, and press Ctrl-C as soon as it has shown what matches ``until``; more times 0.3 s apart."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # this run may be in a background, which ignores it
        os.chdir(cwd)
        os.execvpe(command[0], list(command), {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment})
    shown, before, due, pressed = b"", None, float("inf"), 0
    deadline = time.monotonic() + PATIENCE
    while True:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the last process that had it open ended
                break
        if before is None and re.search(until.encode(), shown):
            before, due = len(shown), time.monotonic()
        if pressed < times and time.monotonic() >= due:
            os.write(terminal, CTRL_C)
            pressed, due = pressed + 1, time.monotonic() + 0.3
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[before or 0 :].decode(errors="replace"))
    lines = [line.rpartition("\r")[2].removeprefix("^C") for line in text.replace("\r\n", "\n").splitlines()]
    return Ended(status, [line for line in lines if line.strip() and "━" not in line], _session(pid))


def _session(leader: int) -> list[str]:
    """Return the command lines of the processes that a session still has; only Linux tells."""
    found = []
    for process in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else []:
        try:
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (process / "cmdline").read_text().replace("\0", " ")
            if int(session) == leader and state != "Z" and command:  # one that is ending has none any more
                found.append(command)
        except OSError:
            continue
    return found
