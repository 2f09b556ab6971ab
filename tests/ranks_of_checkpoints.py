"""Runs small enough to be saved by tests/training/test_checkpoints.py, and what its processes do; apart, so that they can
import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import files_end_at
from ranks_of_training import CASES, backward, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from ditfast.sampling.ranks import Ranks
from ditfast.training.checkpoints import CheckpointFault, Checkpoints, start_at_zero
from ditfast.training.parallel import distribute, full_tensors, told

ALONE = Ranks()


class Run:
    """A model and its optimizer; ``called`` is what ranks share."""

    def __init__(self, ranks: Ranks = ALONE, kind: str = "ddp", seed: int = 0):
        self.ranks = ranks
        self.model = CASES["adaln_zero"].model(seed)
        self.called: nn.Module = distribute(self.model, kind, ranks)
        self.optimizer = torch.optim.AdamW(trained(self.model).values(), lr=1e-2, fused=True)
        self.plain = {"count": seed, "name": f"run {seed}"}

    def step(self, number: int) -> None:
        backward(self.called, self.ranks, step=number)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.called, self.optimizer)
        return {"model": model, "optimizer": optimizer, "plain": self.plain}

    def fill(self, checkpoints: Checkpoints, path: Path) -> None:
        state = self.state()
        checkpoints.load(path, state)
        set_state_dict(self.called, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.plain = state["plain"]

    def content(self) -> dict[str, Any]:
        """Whole copies of all tensors, on the first rank."""
        state = self.state()
        tensors: dict[str, Tensor] = dict(state["model"])
        for name, kept in state["optimizer"]["state"].items():
            tensors |= {f"{name}, {key}": value for key, value in kept.items()}
        return {name: value.clone() for name, value in full_tensors(tensors).items()} | self.plain


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        same = torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name]
        assert same, name


# ------------------------------------------------------------------------------------------------ what ranks do
def save_after_two_steps(ranks: Ranks, folder: Path, kind: str) -> None:
    run = Run(ranks, kind)
    for number in (0, 1):
        run.step(number)
    path = Checkpoints(folder, 1, ranks).save(2, run.state(), {"kind": kind})
    content = run.content()
    if ranks.rank == 0:
        assert path.is_dir()
        torch.save(content, folder / "content.pt")


def load_and_compare(ranks: Ranks, folder: Path, kind: str) -> None:
    run = Run(ranks, kind, seed=1)
    checkpoints = Checkpoints(folder, 1, ranks)
    newest = checkpoints.newest()
    assert newest is not None
    run.fill(checkpoints, newest[0])
    for parameter in run.model.parameters():
        assert isinstance(parameter, DTensor) == (kind == "fsdp" and ranks.world > 1)
    content = run.content()
    if ranks.rank == 0:
        assert_same(content, torch.load(folder / "content.pt"))


def one_ranks_disk_is_full(ranks: Ranks, folder: Path) -> None:
    run = Run(ranks, "fsdp")
    checkpoints = Checkpoints(folder, 2, ranks)
    checkpoints.save(1, run.state(), {})
    room = 10_000 if ranks.rank else 10_000_000
    with files_end_at(room), pytest.raises(CheckpointFault, match="step-00000002: File too large"):
        checkpoints.save(2, run.state(), {})
    told("the first rank has tidied up")
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1] == {"step": 1}


def all_ranks_hear_of_a_damaged_one(ranks: Ranks, folder: Path) -> None:
    run = Run(ranks, "fsdp")
    checkpoints = Checkpoints(folder, 1, ranks)
    path = checkpoints.save(1, run.state(), {})
    if ranks.rank == 0:
        (path / "__1_0.distcp").unlink()
        with pytest.warns(UserWarning, match=r"step-00000001: not a whole checkpoint: __1_0\.distcp is missing"), _refused():
            checkpoints.newest()
    else:
        with _refused():
            checkpoints.newest()


def ranks_share_no_folder(ranks: Ranks, folder: Path) -> None:
    run = Run(ranks, "fsdp")
    mine = folder / f"of rank {ranks.rank}"
    with pytest.raises(CheckpointFault, match="expected a folder that all ranks share"):
        Checkpoints(mine, 1, ranks).save(1, run.state(), {})
    assert not list(mine.glob("step*"))


def _refused() -> Any:
    return pytest.raises(CheckpointFault, match="no checkpoint in it is whole")


def save_forever(folder: Path) -> None:
    """To be killed."""
    torch.set_num_threads(1)
    run = Run()
    checkpoints = Checkpoints(folder, 2, ALONE)
    newest = checkpoints.newest()
    step = 0
    weight = torch.zeros(4_000_000)  # so that what is half there is half there for a while
    if newest is not None:
        run.fill(checkpoints, newest[0])
        step = newest[1]["step"]
    start_at_zero(run.called, run.optimizer)
    while True:
        step += 1
        run.plain["count"] = step
        checkpoints.save(step, run.state() | {"weight": weight}, {"count": step})
