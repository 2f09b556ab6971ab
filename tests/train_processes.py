"""What tests of ``ditfast train`` share: a command that takes a second, ranks of it to be killed, and what a run has left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support import randomize
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torchrun import PATIENCE

import ditfast
from ditfast import DiTConfig, save_checkpoint
from ditfast.cli import main
from ditfast.sampling.ranks import Ranks
from ditfast.training import Digits, RunOptions, Trainer, TrainSettings
from ditfast.training.data import Record
from ditfast.training.order import batch_indices
from ditfast.training.parallel import full_tensors, told

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=1, num_classes=10)
PRELOADED = ["ditfast.cli", "ditfast.training.checkpoints", "sklearn.datasets", "torch._dynamo"]
STEPS, SAVE_EVERY = 24, 4
RECIPE = TrainSettings(
    STEPS, batch=8, accumulate=2, rate=1e-2, warm_up=4, max_norm=1.0, ema=(0.9, 0.5), timesteps="importance", flip=False
)
COMMAND = (
    f"train --data digits --steps {STEPS} --batch 8 --accumulate 2 --rate 1e-2 --schedule constant --warm-up 4 --max-norm 1"
    f" --ema 0.9 0.5 --timesteps importance --save-every {SAVE_EVERY} --keep {STEPS}"
).split()
LOADED = ("model.", "optimizer.", "averages.")
LOGS = ("log.jsonl", "timesteps.jsonl", "evaluation.jsonl")


def tiny_model(path: Path, **shape: int) -> str:
    """For ``--init``: the digits model's shape is too slow to be killed often.

    Args:
        path: of the checkpoint.
        shape: fields of the config, for other data than digits.
    """
    torch.manual_seed(0)
    save_checkpoint(randomize(ditfast.DiT(dataclasses.replace(CONFIG, **shape))), path)
    return str(path)


class Run:
    """A rank, or several that find each other, of ``ditfast``: forked off a process that has torch imported already.

    Args:
        arguments: of ``ditfast``.
        world: number of ranks.
        errors: a folder for what they say on stderr.
    """

    def __init__(self, arguments: list[str], world: int, errors: Path):
        multiprocessing.set_forkserver_preload(PRELOADED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._errors = [errors / f"{port}-{rank}" for rank in range(world)]
        self.ranks = [
            multiprocessing.get_context("forkserver").Process(target=_rank, args=(rank, world, port, arguments, file))
            for rank, file in enumerate(self._errors)
        ]
        for process in self.ranks:
            process.start()

    def wait(self) -> list[int | None]:
        """Exit statuses; negative that of a process that a signal ended."""
        for process in self.ranks:
            process.join(PATIENCE)
        return [process.exitcode for process in self.ranks]

    def errors(self) -> list[list[str]]:
        """Each rank's lines."""
        return [file.read_text().splitlines() if file.exists() else [] for file in self._errors]

    def is_over(self) -> bool:
        return not any(process.is_alive() for process in self.ranks)

    def signal(self, number: int, ranks: slice = slice(None)) -> None:
        for process in self.ranks[ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)


@contextlib.contextmanager
def cleaned_up(runs: list[Run]) -> Iterator[None]:
    """None of them outlives the block."""
    try:
        yield
    finally:
        for run in runs:
            run.signal(signal.SIGKILL)
            run.wait()


def _rank(rank: int, world: int, port: int, arguments: list[str], errors: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    multiprocessing.set_start_method(None, force=True)  # processes that read begin as in a run started from a shell
    torch.set_num_threads(1)
    sys.exit(main(arguments))


# ------------------------------------------------------------------------------------------------ what a run has left
def steps_logged(out: Path) -> int:
    """0 of a run that has not begun, or whose last line is not whole."""
    log = out / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith(b"\n") else 0


def lines(out: Path, log: str = "log") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{log}.jsonl").read_text().splitlines()]


def saved(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def contents(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Everything in it, by name, put together from all ranks' parts."""
    file = scratch / "whole.pt"
    dcp_to_torch_save(checkpoint, file)
    found = _flat(torch.load(file, weights_only=True))
    about = json.loads((checkpoint / "manifest.json").read_text())["about"]
    return found | {f"about.{name}": value for name, value in about.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def assert_same_runs(one: Path, other: Path, scratch: Path) -> None:
    """Logs, weights to be used, and every tensor and number of the last checkpoint, to the bit."""
    for name in LOGS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert_same(*(load_file(out / "model.safetensors") for out in (one, other)))
    assert saved(one)[-1].name == saved(other)[-1].name
    assert_same(*(contents(saved(out)[-1], scratch) for out in (one, other)))


# ------------------------------------------------------------------------------------------------ what each rank does
def takes_over(ranks: Ranks, kind: str, init: str, out: Path, scratch: Path) -> None:
    """Goes on from a folder's one checkpoint, once it is seen that all of it was loaded."""
    (checkpoint,) = saved(out)
    step = int(checkpoint.name.removeprefix("step-"))
    for steps in (step, STEPS):
        settings = dataclasses.replace(RECIPE, steps=steps)
        model, options = ditfast.load_checkpoint(init), RunOptions(SAVE_EVERY)
        trainer = Trainer(model, Digits(), settings, out, options, ranks=ranks, parallel=kind)
        trainer.run(resume=True)
        if steps == step:
            found = whole_state(trainer)
            if ranks.rank == 0:
                expected = contents(checkpoint, scratch)
                assert_same(found, {name: expected[name] for name in expected if name.startswith(LOADED)})
                assert expected["timesteps.seen"].sum() == expected["about.samples"] == step * RECIPE.batch


def whole_state(trainer: Trainer) -> dict[str, Any]:
    """The tensors of the model, the optimizer and the averages, on the first rank, named as in a checkpoint."""
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer, options=StateDictOptions(full_state_dict=True))
    averages = {str(decay): full_tensors(average) for decay, average in trainer.averages.by_decay.items()}
    return _flat({"model": model, "optimizer": optimizer, "averages": averages})


class _Killed(Exception):
    pass


def _killed_after(steps: int) -> Callable[..., None]:
    def on_step(report: object, done: int, speed: object) -> None:
        if done == steps:
            raise _Killed

    return on_step


def scales_its_loss(ranks: Ranks, kind: str, folder: Path) -> None:
    """In fp16, from a scale that is too large; once as a whole, and once killed and resumed to the same bits.

    What is killed is saved before it has taken its first step.
    """
    recipe = dataclasses.replace(RECIPE, steps=6, dtype="fp16")

    def trainer(out: str, save_every: int, **given: Any) -> Trainer:
        torch.manual_seed(0)
        model, options = randomize(ditfast.DiT(CONFIG)), RunOptions(save_every)
        made = Trainer(model, Digits(), recipe, folder / out, options, ranks=ranks, parallel=kind, **given)
        made.stepper.scale.scale = 2.0**19
        return made

    whole, resumed = trainer("whole", save_every=6), trainer("killed", save_every=2)
    whole.run()
    with contextlib.suppress(_Killed):
        trainer("killed", save_every=2, on_step=_killed_after(5)).run()
    resumed.run(resume=True)
    assert_same(whole_state(resumed), whole_state(whole))
    seen = told((resumed.skipped, resumed.stepper.scale.scale, resumed.stepper.scale.finite_steps))
    assert seen == [(whole.skipped, whole.stepper.scale.scale, whole.stepper.scale.finite_steps)] * ranks.world


class _Poisoned(Digits):
    """The digits, of which the first step's last and the third's first are NaN."""

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        batches = [batch_indices(0, len(self), RECIPE.batch, step) for step in range(3)]
        bad = index in (batches[0][-1], batches[2][0])
        return record._replace(values=torch.full_like(record.values, math.nan)) if bad else record


def skips_what_one_rank_reads(ranks: Ranks, kind: str, out: Path) -> None:
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPE, steps=4, timesteps="uniform")
    trainer = Trainer(randomize(ditfast.DiT(CONFIG)), _Poisoned(), recipe, out, ranks=ranks, parallel=kind)
    trainer.run()
    assert told(trainer.skipped) == [2] * ranks.world
    for name, value in whole_state(trainer).items():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name
