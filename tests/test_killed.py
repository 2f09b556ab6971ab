"""Two ranks under torchrun, killed again and again, against one process that nobody kills."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sampling_cli import content

from ditfast.cli import main
from ditfast.images import load_png
from ditfast.threads import one_thread

NUM = 96
RUN = ["sample", "--num-images", str(NUM), "--batch", "4", "--steps", "ddim40", "--cfg", "3", "--seed", "5", "--npz"]
PATIENCE = 300.0  # seconds, on a machine that has much else to do


class Torchrun:
    """Two ranks of a run, and the agent that started them."""

    def __init__(self, out: Path):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ditfast"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.agent = subprocess.Popen([*launcher, *RUN, "--out", str(out)], env=environment, stderr=subprocess.DEVNULL)
        self.ranks: list[int] = []
        wait_for(lambda: len(self._children()) == 2 or self.agent.poll() is not None)

    def _children(self) -> list[int]:
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


def images(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.png"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_ranks_killed_five_times_make_the_bytes_of_one_process(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with one_thread():
        assert main([*RUN, "--out", str(whole)]) == 0
    chance = random.Random(0)
    runs: list[Torchrun] = []
    made: dict[Path, tuple[int, int]] = {}
    try:
        for k, victims in enumerate(("everything", "everything", "a rank", "everything", "the agent")):
            runs.append(Torchrun(killed))
            if k == 0:
                time.sleep(chance.uniform(0, 3))
            else:  # the first image, or one of the next three blocks'
                wanted = len(images(killed)) + chance.randint(1, 9)
                wait_for(lambda wanted=wanted: len(images(killed)) >= wanted)  # type: ignore[misc]
                time.sleep(chance.uniform(0, 0.1))
            runs[-1].kill(victims)
            assert len(images(killed)) < NUM, "killed too late"
            for image in images(killed):
                load_png(image)  # not half-written
                stat = image.stat()
                assert made.setdefault(image, (stat.st_ino, stat.st_mtime_ns)) == (stat.st_ino, stat.st_mtime_ns)
        runs.append(Torchrun(killed))  # beside the last one's ranks, which go on without their agent
        assert runs[-1].agent.wait(PATIENCE) == 0
        runs[-2].wait_for_ranks()
    finally:
        for run in runs:
            run.clean_up()
    assert all((image.stat().st_ino, image.stat().st_mtime_ns) == stat for image, stat in made.items())
    assert content(killed) == content(whole)
