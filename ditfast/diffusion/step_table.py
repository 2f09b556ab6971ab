"""Numbers of the kept steps, looked up for every sample of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..argument_checks import check_device, check_tensor
from .schedule import NUM_TRAIN_STEPS
from .solvers import Step, Update, compute_dtype


class StepTable:
    """A row of float64 numbers, one from each column, for every kept step, ascending; each device gets its copy once."""

    def __init__(self, timesteps: list[int], *columns: Tensor):
        self._timesteps = timesteps
        self._rows = torch.stack(columns, dim=1)
        by_step = torch.full((NUM_TRAIN_STEPS, len(columns)), math.nan, dtype=torch.float64, device="cpu")
        by_step[timesteps] = self._rows
        self._by_step = {torch.device("cpu"): by_step}

    def steps(self, prediction: str) -> list[Step]:
        """Return the rows as a solver's steps, from noise to image; the columns are those of ``Update``."""
        rows = zip(self._timesteps, self._rows.tolist(), strict=True)
        return [Step(float(t), Update(*row), prediction=prediction) for t, row in rows][::-1]

    def columns(self, t: Tensor, x: Tensor) -> list[Tensor]:
        """Each column at t [B], as [B, 1, ...] of the rank of x and the dtype of its arithmetic.

        Raises:
            ValueError: t's shape or dtype, or (on the CPU) a step that is not kept.
        """
        check_tensor("t", t, "of integers, one for each sample of x")
        if t.shape != x.shape[:1] or t.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise ValueError(f"t: got {t.dtype} {tuple(t.shape)}, expected {x.shape[0]} integers, one for each sample of x")
        check_device("t", t, x)
        if t.device.type == "cpu" and not set(t.tolist()) <= set(self._timesteps):
            kept = list(map(str, self._timesteps))
            kept = kept if len(kept) <= 8 else [*kept[:2], "...", kept[-1]]
            raise ValueError(f"t: got {t.tolist()}, expected original steps that .timesteps keeps: {', '.join(kept)}")
        if t.device not in self._by_step:
            self._by_step[t.device] = self._by_step[torch.device("cpu")].to(t.device)
        rows = self._by_step[t.device][t.long()].to(compute_dtype(x))
        return [column.view(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)]

    def update(self, t: Tensor, x: Tensor) -> Update:
        """The rows at t [B], as one ``Update`` of tensors."""
        columns: list = self.columns(t, x)
        return Update(*columns)
