"""Checkpoints of a run: sharded as its tensors are, each whole or not there, however the ranks end.

On disk a checkpoint is a folder ``step-00001000``: what torch.distributed.checkpoint wrote, and ``manifest.json`` with the size
and hash of each file. torch.distributed.checkpoint unpickles its index and plain values: load no stranger's checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..checkpoints.runs import MANIFEST, STEP_PREFIX, checked_manifest, fault_of, find_steps, sha256, sha256_of
from ..files import PART, without_positions
from ..sampling.ranks import Ranks
from .parallel import told

T = TypeVar("T")


class CheckpointFault(ValueError):
    """A checkpoint that cannot be written or read: which one and why, on one line."""


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with without_positions():
            return super().write_data(plan, planner)


class Checkpoints:
    """The checkpoints in a folder, which all ranks share. Every method is called by all ranks, and raises on all or on none."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self._torn: list[Path] = []

    def save(self, step: int, state: dict[str, Any], about: dict[str, Any]) -> Path:
        """Writes a checkpoint, a folder; then older ones go, but for the last ``keep`` and those that ``newest`` found torn.

        Args:
            step: how many were taken. A whole checkpoint of that step stays as it is.
            state: nested dicts of tensors (plain ones are the same on all ranks) and of plain values.
            about: to be written down with it, as JSON takes it.

        Raises:
            CheckpointFault: it cannot be written; the older ones are still there.
        """
        final = self.path(step)
        part = final.with_name(f".{final.name}{PART}")
        if self._first(final, lambda: _is_whole(final)):
            return final
        try:
            self._first(final, lambda: self._begin(part))
            self._together(final, lambda: self._quietly(checkpoint.save, state, storage_writer=_Writer(part)))
            files = dict(ChainMap(*told(self._together(final, lambda: _own_files(part, self.ranks.rank)))))
            self._first(final, lambda: self._finish(part, final, {"step": step, "about": about, "files": files}))
        finally:
            if self.ranks.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
        self._first(final, lambda: self._tidy(step))
        return final

    def path(self, step: int) -> Path:
        return self.folder / f"{STEP_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that are there, torn ones too."""
        return [step for step, _ in find_steps(self.folder)]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint, what ``save`` was told about it, and its ``step``; None where there is none at all.

        A newer one that is torn or damaged is named in a warning.

        Raises:
            CheckpointFault: there are some, but none is whole; or the folder cannot be read.
        """
        return self._first(self.folder, self._newest)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fills tensors in place, whatever number of ranks saved them, and replaces plain values; some of those saved will do.

        Raises:
            CheckpointFault: it holds something else, or cannot be read.
        """
        self._together(path, lambda: self._quietly(checkpoint.load, state, storage_reader=FileSystemReader(path)))

    def _quietly(self, function: Callable[..., object], state: dict[str, Any], **storage: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of a single rank, which is as it should be
            function(state, no_dist=self.ranks.world == 1, **storage)

    def _together(self, path: Path, action: Callable[[], T]) -> T:
        """The action's result, once every rank has done it."""
        result: T | None = None
        why = None
        try:
            result = action()
        except (OSError, CheckpointException) as error:
            why = _reason(error)
        reasons = [reason for reason in told(why) if reason is not None]
        if reasons:
            raise CheckpointFault(f"{path}: {reasons[0]}")
        return cast(T, result)

    def _first(self, path: Path, action: Callable[[], T]) -> T:
        """The result of an action that is the first rank's, on every rank."""
        return told(self._together(path, lambda: action() if self.ranks.rank == 0 else None))[0]

    def _begin(self, part: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f".{STEP_PREFIX}*{PART}"):
            shutil.rmtree(leftover)
        part.mkdir()

    def _finish(self, part: Path, final: Path, manifest: dict[str, Any]) -> None:
        missing = [name for name in manifest["files"] if not (part / name).is_file()]
        if missing:
            raise OSError(f"{missing[0]} of another rank is not there, expected a folder that all ranks share")
        with (part / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({**manifest, "sha256": sha256_of(json.loads(json.dumps(manifest)))}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        _sync(part)
        if final.exists():  # torn: ``save`` keeps a whole one
            shutil.rmtree(final)
        part.rename(final)
        _sync(self.folder)
        self._torn = [path for path in self._torn if path != final]

    def _tidy(self, step: int) -> None:
        whole = [path for number, path in find_steps(self.folder) if number <= step and path not in self._torn]
        for path in whole[: -self.keep]:
            shutil.rmtree(path)

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        faults: list[str] = []
        self._torn = []
        if self.folder.exists():
            os.scandir(self.folder).close()  # raises where a file is in its place
        for step, path in reversed(find_steps(self.folder)):
            try:
                return path, {**checked_manifest(path)["about"], "step": step}
            except (OSError, ValueError) as error:
                faults.append(f"{path.name}: {_reason(error)}")
                warnings.warn(f"{path}: not a whole checkpoint: {_reason(error)}", stacklevel=2)
                self._torn.append(path)
        if faults:
            raise OSError(f"no checkpoint in it is whole: {'; '.join(faults)}")
        return None


def start_at_zero(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives AdamW the state that it has before its first step, so that it can be saved.

    Asked for a state that is not there yet, torch takes a step of zero gradients to make it, and counts it.
    """
    get_optimizer_state_dict(model, optimizer)
    for state in optimizer.state.values():
        state["step"].zero_()


def _is_whole(path: Path) -> bool:
    try:
        checked_manifest(path)
    except (OSError, ValueError):
        return False
    return True


def _own_files(part: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and hash of what a rank wrote; of the first also the index that torch.distributed.checkpoint wrote."""
    files = [*part.glob(f"__{rank}_*"), *([part / ".metadata"] if rank == 0 else [])]
    return {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}


def _sync(folder: Path) -> None:
    """So that the names in it outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
        if not isinstance(error, Exception):  # Ctrl-C
            raise error
    return fault_of(error)
