"""Training runs killed again and again, against runs that nobody kills: one process, and two ranks under DDP and FSDP2."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from several_ranks import on_ranks
from torch import distributed
from torchrun import PATIENCE, Torchrun, wait_for
from train_processes import (
    COMMAND,
    SAVE_EVERY,
    STEPS,
    Run,
    assert_same_runs,
    cleaned_up,
    lines,
    saved,
    steps_logged,
    takes_over,
    tiny_model,
)

from ditfast.sampling.ranks import Ranks

EVERYTHING, FIRST, LAST = slice(None), slice(1), slice(-1, None)
ARGUMENTS = {
    "one process": [],
    "one and a reader": ["--workers", "1"],
    "ddp": ["--parallel", "ddp"],
    "fsdp": ["--parallel", "fsdp"],
}
WORLDS = {how: 2 if how in ("ddp", "fsdp") else 1 for how in ARGUMENTS}
ANOTHER_ENDED = "another rank ended; the same command goes on from the newest checkpoint"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*COMMAND, "--init", tiny_model(tmp_path_factory.mktemp("init") / "init.safetensors"), "--resume", "auto"]


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that nobody kills; each is made once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def made(how: str) -> Path:
        out = folder / how
        if not out.exists():
            run = Run([*command, *ARGUMENTS[how], "--out", str(out)], WORLDS[how], folder)
            with cleaned_up([run]):
                assert run.wait() == [0] * WORLDS[how], run.errors()
        return out

    return made


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """None of them outlives the test."""
    runs: list[Run] = []
    with cleaned_up(runs):
        yield runs


def wait_for_steps(out: Path, steps: int, is_over: Callable[[], bool]) -> None:
    wait_for(lambda: steps_logged(out) >= steps or is_over())


# ------------------------------------------------------------------------------------------------ killed
@pytest.mark.parametrize("how", ARGUMENTS)
def test_a_killed_run_leaves_the_bits_of_one_that_nobody_killed(
    how: str, command: list[str], undisturbed: Callable[[str], Path], runs: list[Run], tmp_path: Path
) -> None:
    killed, world, chance = tmp_path / "killed", WORLDS[how], random.Random(how)
    arguments = [*command, *ARGUMENTS[how], "--out", str(killed)]
    for victims in (EVERYTHING, LAST, FIRST):
        runs.append(Run(arguments, world, tmp_path))
        wait_for_steps(killed, steps_logged(killed) + chance.randint(1, 5), runs[-1].is_over)
        time.sleep(chance.uniform(0, 0.05))
        runs[-1].signal(signal.SIGKILL, victims)
        statuses, errors = runs[-1].wait(), runs[-1].errors()
        assert -signal.SIGKILL in statuses, f"killed too late: {statuses}, {errors}"
        for rank in range(world):
            if statuses[rank] != -signal.SIGKILL:
                assert (statuses[rank], errors[rank]) == (1, [f"ditfast train (rank {rank}): {ANOTHER_ENDED}"])
    assert saved(killed), "killed too early"
    runs.append(Run(arguments, world, tmp_path))
    assert (runs[-1].wait(), runs[-1].errors()) == ([0] * world, [[]] * world)
    assert_same_runs(killed, undisturbed(how), tmp_path)


# ------------------------------------------------------------------------------------------------ under torchrun
def test_torchrun_starts_ranks_anew_when_one_is_killed(
    command: list[str], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    run = Torchrun([*command, *ARGUMENTS["ddp"], "--out", str(out)], "--max-restarts", "1", errors=errors)
    try:
        wait_for_steps(out, SAVE_EVERY + 2, lambda: run.agent.poll() is not None)
        os.kill(run.ranks[1], signal.SIGKILL)
        assert run.agent.wait(PATIENCE) == 0, errors.read_text()
    finally:
        run.clean_up()
    assert_same_runs(out, undisturbed("ddp"), tmp_path)


def test_torchrun_asked_to_stop_leaves_a_checkpoint(
    command: list[str], undisturbed: Callable[[str], Path], runs: list[Run], tmp_path: Path
) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    arguments = [*command, *ARGUMENTS["fsdp"], "--out", str(out)]
    run = Torchrun(arguments, errors=errors)
    try:
        wait_for_steps(out, 2, lambda: run.agent.poll() is not None)
        run.agent.terminate()
        assert run.agent.wait(PATIENCE) != 0
        run.wait_for_ranks()
    finally:
        run.clean_up()
    step = steps_logged(out)
    assert 2 <= step < STEPS, "stopped too late"
    assert saved(out)[-1].name == f"step-{step:08d}"
    said = [line for line in errors.read_text().splitlines() if line.startswith("ditfast")]
    stopped = f"stopped at step {step}, which {saved(out)[-1]} holds; --resume auto goes on from there"
    assert sorted(said) == [f"ditfast train (rank {rank}): {stopped}" for rank in range(2)]
    runs.append(Run(arguments, 2, tmp_path))
    assert runs[-1].wait() == [0, 0], runs[-1].errors()
    assert_same_runs(out, undisturbed("fsdp"), tmp_path)


# ------------------------------------------------------------------------------------------------ beside each other
def test_a_second_run_is_kept_out_while_the_first_one_lives(command: list[str], runs: list[Run], tmp_path: Path) -> None:
    """As ranks do whose agent was killed."""
    out = tmp_path / "out"
    arguments = [*command, "--out", str(out)]
    runs.append(Run(arguments, 1, tmp_path))
    wait_for_steps(out, 2, runs[0].is_over)
    runs[0].signal(signal.SIGSTOP)
    logged = (out / "log.jsonl").read_bytes()
    for world in (1, 2):
        runs.append(Run(arguments, world, tmp_path))
        assert runs[-1].wait() == [2] * world
        for said in runs[-1].errors():
            assert [line.partition(": ")[2] for line in said] == [f"{out}: another process is training in it"]
    assert (out / "log.jsonl").read_bytes() == logged
    runs[0].signal(signal.SIGCONT)
    assert runs[0].wait() == [0]


# ------------------------------------------------------------------------------------------------ other numbers of ranks
@pytest.mark.parametrize(
    ("before", "after"),
    [("ddp", "one process"), ("fsdp", "one process"), ("one process", "ddp"), ("one process", "fsdp"), ("fsdp", "ddp")],
)
def test_other_ranks_take_over(
    before: str, after: str, command: list[str], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed(before), out)
    for other in saved(out)[:2] + saved(out)[3:]:
        shutil.rmtree(other)
    init = command[command.index("--init") + 1]
    if WORLDS[after] == 1:
        takes_over(Ranks(), "ddp", init, out, tmp_path)
    else:
        on_ranks(2, takes_over, after, init, out, tmp_path)
    assert steps_logged(out) == STEPS
    found, expected = ([line["loss"] for line in lines(run)] for run in (out, undisturbed("one process")))
    assert found == pytest.approx(expected, rel=1e-5)
