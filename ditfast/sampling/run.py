"""A batch through its steps: what the model is given at each, and what becomes of the state."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..diffusion.solvers import Step, Update
from ..model import DiT
from ..modulation_table import ModulationTable
from .graph import Graphed
from .noise import image_noise
from .scheduler import unstepped

PREDICTION = Update(x0_from_x=0, x0_from_output=1, from_x0=1, from_x=0, log_variance_min=-math.inf, log_variance_max=-math.inf)
LEARNED_VARIANCES = ("learned", "learned_range")


class Batch(NamedTuple):
    labels: Tensor  # [B]
    images: Sequence[int]  # their numbers
    scale: Tensor | None  # [B] fp32; None: no guidance


class Conditions:
    """What tells the model where a step is: modulation vectors from the table, or times and labels."""

    def __init__(self, model: DiT, batch: Batch, times: Sequence[float], interval: tuple[float, float], table_bytes: int):
        self.times = times
        self.scale = batch.scale
        self.guided = [batch.scale is not None and interval[0] <= t <= interval[1] for t in times]
        null = torch.full_like(batch.labels, model.config.null_class)
        self.labels = torch.cat([batch.labels, null]) if any(self.guided) else batch.labels
        self.size = len(batch.labels)
        tabulated = table_bytes > 0 and model.config.modulation_vectors > 0 and len(batch.labels) > 0
        self.table = ModulationTable(model, times, self.labels, table_bytes) if tabulated else None

    def at(self, step: int) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The scale, None without guidance; and [vectors], or [t, y], of as many samples as the step needs."""
        samples = slice(None) if self.guided[step] else slice(self.size)
        scale = self.scale if self.guided[step] else None
        if self.table is not None:
            return scale, (self.table.vectors(step)[samples],)
        labels = self.labels[samples]
        return scale, (torch.full_like(labels, self.times[step], dtype=torch.float32), labels)


class Run:
    """Everything about a run but its batches."""

    def __init__(
        self,
        model: DiT,
        clip: bool,
        interval: tuple[float, float],
        guided_channels: int,
        seed: int,
        table_bytes: int,
    ):
        self.model = model
        self.clip = clip
        self.interval = interval
        self.guided_channels = guided_channels
        self.seed = seed
        self.table_bytes = table_bytes
        self.device, self.dtype = model.pos_embed.device, model.pos_embed.dtype
        self.prediction_row = self._rows([PREDICTION])[0]
        on_cuda = self.device.type == "cuda"
        self.advance: Callable[..., Tensor] = Graphed(self._advance) if on_cuda else self._advance
        self.predict: Callable[..., Tensor] = Graphed(self._predict) if on_cuda else self._predict

    def solved(self, steps: Sequence[Step], batch: Batch) -> Iterator[Tensor]:
        """The state [B, C, H, W] after each of a solver's steps; valid until the next."""
        conditions = Conditions(self.model, batch, [step.t for step in steps], self.interval, self.table_bytes)
        rows = self._rows([step.update for step in steps])
        averages = any(step.corrects for step in steps)
        x, x_before, output_before = self._noise(batch), None, None
        for i, step in enumerate(steps):
            noise = self._noise(batch, i + 1) if step.update.adds_noise else None
            scale, given = conditions.at(i)
            if not averages:
                x = self.advance(x, noise, rows[i], scale, *given)
            else:
                output = self.predict(x, scale, *given).clone()  # [B, C, H, W]
                if step.corrects and x_before is not None and output_before is not None:
                    x, output = x_before, (output_before + output) / 2
                x_before, output_before = x, output
                x = ops.denoise_update(x, output, noise, rows[i], clip=self.clip)
            yield x

    def scheduled(self, scheduler: Any, batch: Batch) -> Iterator[Tensor]:
        """The same, after each step of a copy of a diffusers scheduler."""
        scheduler = unstepped(scheduler)
        times = [float(t) for t in scheduler.timesteps]
        conditions = Conditions(self.model, batch, times, self.interval, self.table_bytes)
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = [_generator(self.seed, image) for image in batch.images]
        learned = getattr(getattr(scheduler, "config", None), "variance_type", None) in LEARNED_VARIANCES
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flow matching has neither
        x = self._noise(batch) * getattr(scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(scheduler.timesteps):
            scale, given = conditions.at(i)
            output = self._output(scaled(x, t), *given).float()  # [B or 2B, C or 2C, H, W]
            prediction = ops.denoise_update(x, output, None, self.prediction_row, scale, self._guided(scale))
            variance = output[: len(x), x.shape[1] :]
            output = torch.cat([prediction, variance], dim=1) if learned else prediction
            x = scheduler.step(output, t, x, **options).prev_sample.float()
            yield x

    def _advance(self, x: Tensor, noise: Tensor | None, row: Tensor, scale: Tensor | None, *given: Tensor) -> Tensor:
        return ops.denoise_update(x, self._output(x, *given), noise, row, scale, self._guided(scale), self.clip)

    def _predict(self, x: Tensor, scale: Tensor | None, *given: Tensor) -> Tensor:
        """What the guided model says of x, without a variance: [B, C, H, W] fp32."""
        return ops.denoise_update(x, self._output(x, *given), None, self.prediction_row, scale, self._guided(scale))

    def _output(self, x: Tensor, *given: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if len(given) == 1:
            return self.model.forward_modulated(x, given[0])
        t, labels = given
        return self.model(x if len(labels) == len(x) else torch.cat([x, x]), t, labels)

    def _guided(self, scale: Tensor | None) -> int:
        return 0 if scale is None else self.guided_channels

    def _rows(self, updates: Sequence[Update]) -> Tensor:
        return torch.tensor(updates, dtype=torch.float32, device=self.device)

    def _noise(self, batch: Batch, step: int = 0) -> Tensor:
        return image_noise(self.model.config.input_shape, batch.images, self.seed, step).to(self.device)


def _generator(seed: int, image: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, image]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
