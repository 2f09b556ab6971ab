"""Two ranks of a command under torchrun, to be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PATIENCE = 300.0  # seconds, on a machine that has much else to do


class Torchrun:
    """The agent, and the ranks that it started.

    Args:
        arguments: of ``ditfast``.
        options: of torchrun.
        errors: where stderr of all of them goes.
    """

    def __init__(self, arguments: Sequence[str], *options: str, errors: Path | None = None):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        with open(errors or os.devnull, "w") as stderr:
            self.agent = subprocess.Popen(
                [*launcher, "-m", "ditfast", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=stderr
            )
        self.ranks: list[int] = []
        wait_for(lambda: len(self.children()) == 2 or self.agent.poll() is not None)

    def children(self) -> list[int]:
        """The ranks of now: other ones once the agent has started them anew."""
        self.ranks = [pid for pid in processes() if parent(pid) == self.agent.pid]
        return self.ranks

    def kill(self, victims: str) -> None:
        """``everything``, ``a rank``, of which the agent notices, or ``the agent``, of which the ranks do not."""
        if victims != "the agent":
            for pid in self.ranks if victims == "everything" else self.ranks[1:]:
                os.kill(pid, signal.SIGKILL)
        if victims != "a rank":
            self.agent.kill()
        assert self.agent.wait(PATIENCE) != 0
        if victims != "the agent":
            self.wait_for_ranks()

    def wait_for_ranks(self) -> None:
        wait_for(lambda: not any(parent(pid) is not None for pid in self.ranks))

    def clean_up(self) -> None:
        for pid in (self.agent.pid, *self.ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait(PATIENCE)


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def parent(pid: int) -> int | None:
    """None of a process that has ended."""
    try:
        state, number = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(number)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
