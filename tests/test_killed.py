"""Two ranks under torchrun, killed again and again, against one process that nobody kills."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
from sampling_cli import content
from torchrun import PATIENCE, Torchrun, wait_for

from ditfast.cli import main
from ditfast.images import load_png
from ditfast.threads import one_thread

NUM = 96
RUN = ["sample", "--num-images", str(NUM), "--batch", "4", "--steps", "ddim40", "--cfg", "3", "--seed", "5", "--npz"]


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
            runs.append(Torchrun([*RUN, "--out", str(killed)]))
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
        runs.append(Torchrun([*RUN, "--out", str(killed)]))  # beside the last one's ranks, which go on without their agent
        assert runs[-1].agent.wait(PATIENCE) == 0
        runs[-2].wait_for_ranks()
    finally:
        for run in runs:
            run.clean_up()
    assert all((image.stat().st_ino, image.stat().st_mtime_ns) == stat for image, stat in made.items())
    assert content(killed) == content(whole)
