"""A process that ends when its time is up, with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE_S = 10.0  # between Ctrl-C, at which pytest still writes its results, and the end
POLL_S = 0.1


def run(
    command: Sequence[str], folder: Path, seconds: float, environment: Mapping[str, str], show: Callable[[], None]
) -> int | None:
    """Its exit status; None if it was cut off.

    Args:
        command: to run, in ``folder``, where ``stdout.txt`` and ``stderr.txt`` have what it printed.
        folder: exists.
        seconds: that it may take, those for ending in peace among them.
        environment: in place of this process's.
        show: called ten times a second.

    Raises:
        OSError: it cannot be started.
    """
    deadline = time.monotonic() + seconds
    with (folder / "stdout.txt").open("wb") as out, (folder / "stderr.txt").open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        try:
            if _ended(process, deadline - min(GRACE_S, seconds / 4), show):
                return process.returncode
            _signal(process, signal.SIGINT)
            _ended(process, deadline, show)
            return None
        finally:
            _signal(process, signal.SIGKILL)  # what it started may have outlived it
            process.wait()


def _hear_interrupts() -> None:
    """Else a report that a shell started in the background, deaf to Ctrl-C, would pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ended(process: subprocess.Popen[bytes], deadline: float, show: Callable[[], None]) -> bool:
    while process.poll() is None and time.monotonic() < deadline:
        show()
        time.sleep(POLL_S)
    return process.poll() is not None


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
