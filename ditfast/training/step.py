"""One step of the optimizer: forward and backward of this rank's share, and whether the weights may follow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import DiTConfig
from ..dtypes import DTYPES
from .averages import Averages
from .data import Batch, Data
from .draws import Draws
from .loss_scale import LossScale
from .objective import Objective
from .parallel import accumulating, clip_gradients, gathered
from .settings import TrainSettings, learning_rate


class StepReport(NamedTuple):
    """What a step came to, the same on every rank."""

    t: Tensor  # [batch], on the CPU
    losses: Tensor  # [batch] fp32, on the CPU
    parts: Mapping[str, float]  # means over the batch: loss, mse, vb
    norm: float  # of the gradient, before it is clipped
    rate: float
    taken: bool  # the weights changed
    stop: bool  # some rank was asked to stop


@dataclass(eq=False)
class Stepper:
    """Takes steps of a model."""

    model: nn.Module  # distributed already; called as model(x, t, y); its label table drops no labels itself
    config: DiTConfig
    data: Data  # turns records into latents
    objective: Objective
    optimizer: torch.optim.Optimizer  # over the trained parameters
    averages: Averages
    settings: TrainSettings
    rows: slice  # of the batch, that are this rank's
    device: torch.device

    def __post_init__(self) -> None:
        self.scale = LossScale(self.settings.dtype == "fp16")

    def take(self, step: int, batch: Batch, stop_asked: Callable[[], bool] = lambda: False) -> StepReport:
        """Step number ``step``, counted from 0, on this rank's records."""
        draws = Draws(self.settings.seed, step, self.settings.batch, self.device)
        t, weights = self.objective.sampler.draw(draws.uniform("times"))  # 2 x [batch]
        losses = self._backward(batch, draws, t, weights)  # parts x [rows]
        shared = gathered(torch.stack([*losses.values(), torch.full_like(t[self.rows], stop_asked(), dtype=torch.float32)]))
        *by_part, stops = shared.cpu()  # [batch] each
        parts = {name: values.double().mean().item() for name, values in zip(losses, by_part, strict=True)}
        norm = clip_gradients(self.optimizer, self.settings.max_norm, self.scale.scale)
        taken = math.isfinite(parts["loss"]) and math.isfinite(norm)
        rate = learning_rate(self.settings, step)
        if taken:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.averages.update(step)
            self.objective.sampler.observe(t.cpu(), by_part[0])
        self.optimizer.zero_grad()
        self.scale.update(taken)
        return StepReport(t.cpu(), by_part[0], parts, norm, rate, taken, bool(stops.any()))

    def _backward(self, batch: Batch, draws: Draws, t: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Leaves the gradient of the mean loss in the parameters; each part of the loss [rows], detached."""
        x0, noise, y = self._samples(batch, draws)  # 2 x [rows, C, H, W], [rows]
        t, weights = t[self.rows], weights[self.rows]  # 2 x [rows]
        parts = [tensor.chunk(self.settings.accumulate) for tensor in (x0, t, y, noise, weights)]
        found: list[dict[str, Tensor]] = []
        for k, (*arguments, weight) in enumerate(zip(*parts, strict=True)):
            with accumulating(self.model, last=k + 1 == self.settings.accumulate):
                with self._autocast():
                    losses = self.objective.losses(self.model, *arguments)
                    mean = (losses["loss"] * weight).mean() / self.settings.accumulate
                (mean * self.scale.scale).backward()
            found.append({name: loss.detach().float() for name, loss in losses.items()})
        return {name: torch.cat([losses[name] for losses in found]) for name in found[0]}

    def _samples(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.config.input_shape
        flips = draws.uniform("flips")[self.rows] < (0.5 if self.settings.flip else 0)  # [rows]
        moments, noise = (draws.normal(purpose, shape)[self.rows] for purpose in ("moments", "noise"))  # 2 x [rows, C, H, W]
        x0 = self.data.clean(batch.values.to(self.device, non_blocking=True), flips, moments)  # [rows, C, H, W]
        dropped = draws.uniform("labels")[self.rows] < self.config.class_dropout_prob  # [rows]
        y = batch.labels.to(self.device, non_blocking=True).masked_fill(dropped, self.config.null_class)  # [rows]
        return x0, noise, y

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.settings.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.settings.dtype])


def freeze_label_dropout(model: nn.Module) -> None:
    """Labels are dropped by ``Draws``, whatever the number of ranks: the model's own table does not do it again."""
    model.get_submodule("y_embedder").eval()
