"""A batch through its steps: what the model is given at each, and what becomes of the state."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..diffusion.solvers import Step, Update
from ..modulation_table import ModulationTable, can_tabulate
from .graph import Graphed
from .models import Denoiser
from .noise import Generators, generated_noise, image_noise
from .scheduler import step_scheduler, unstepped

PREDICTION = Update(x0_from_x=0, x0_from_output=1, from_x0=1, from_x=0, log_variance_min=-math.inf, log_variance_max=-math.inf)
LEARNED_VARIANCES = ("learned", "learned_range")

Before: TypeAlias = Callable[[int, Tensor], Tensor]  # (index of a step, latents) -> latents to go on with


class Batch(NamedTuple):
    labels: Tensor  # [B]
    images: Sequence[int]  # their numbers
    scale: Tensor | None  # [B] fp32; None: no guidance
    latents: Tensor | None = None  # [B, C, H, W] fp32 to begin from; None: noise
    first: int = 0  # the first of the steps to take
    generators: Generators | None = None  # which draw all noise; None: the seed and the images' numbers
    resumes: bool = False  # the latents are those of the first step's time, not noise of unit variance

    def part(self, place: slice) -> Batch:
        """Return some of the images."""
        return self._replace(
            labels=self.labels[place],
            images=self.images[place],
            scale=None if self.scale is None else self.scale[place],
            latents=None if self.latents is None else self.latents[place],
            generators=self.generators[place] if isinstance(self.generators, list) else self.generators,
        )


class Stopped(Exception):
    """The end of a run whose callback wants no more steps."""

    def __init__(self, latents: Tensor):
        super().__init__()
        self.latents = latents


class Conditions:
    """What tells the model where a step is: modulation vectors from the table, or times and labels."""

    def __init__(
        self, denoiser: Denoiser, batch: Batch, times: Sequence[float], interval: tuple[float, float], table_bytes: int
    ):
        self.times = times
        self.scale = batch.scale
        self.guided = [batch.scale is not None and interval[0] <= t <= interval[1] for t in times]
        null = torch.full_like(batch.labels, denoiser.config.null_class)
        self.labels = torch.cat([batch.labels, null]) if any(self.guided) else batch.labels
        self.size = len(batch.labels)
        tabulated = table_bytes > 0 and len(batch.labels) > 0 and can_tabulate(denoiser.model)
        self.table = ModulationTable(denoiser.model, times, self.labels, table_bytes) if tabulated else None

    def at(self, step: int) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return the scale, None without guidance; and [vectors], or [t, y], of as many samples as the step needs."""
        samples = slice(None) if self.guided[step] else slice(self.size)
        scale = self.scale if self.guided[step] else None
        if self.table is not None:
            return scale, (self.table.vectors(step)[samples],)
        labels = self.labels[samples]
        return scale, (torch.full_like(labels, self.times[step], dtype=torch.float32), labels)


@dataclass(eq=False)
class Run:
    """Everything about a run but its batches."""

    denoiser: Denoiser
    clip: bool
    interval: tuple[float, float]
    guided_channels: int
    seed: int
    table_bytes: int

    def __post_init__(self) -> None:
        self.device, self.dtype = self.denoiser.device, self.denoiser.dtype
        self.prediction_row = self._rows([PREDICTION])[0]
        on_cuda = self.device.type == "cuda"
        self.advance: Callable[..., Tensor] = Graphed(self._advance) if on_cuda else self._advance
        self.predict: Callable[..., Tensor] = Graphed(self._predict) if on_cuda else self._predict

    def solved(self, steps: Sequence[Step], batch: Batch, before: Before = lambda i, x: x) -> Iterator[Tensor]:
        """Yield the state [B, C, H, W] after each of a solver's steps from ``batch.first`` on; valid until the next.

        ``before`` is called before each step with its index and the state, and returns the state to go on with.
        """
        steps, first = steps[batch.first :], batch.first
        conditions = Conditions(self.denoiser, batch, [step.t for step in steps], self.interval, self.table_bytes)
        rows = self._rows([step.update for step in steps])
        averages = any(step.corrects for step in steps)
        learned = any(step.update.log_variance_min != step.update.log_variance_max for step in steps)
        graphed = self.denoiser.is_unhooked
        advance, predict = (self.advance, self.predict) if graphed else (self._advance, self._predict)
        x, x_before, output_before = self._start(batch), None, None
        for i, step in enumerate(steps):
            x = before(first + i, x)
            noise = self._noise(batch, first + i + 1) if step.update.adds_noise else None
            scale, given = conditions.at(i)
            if not averages:
                x = advance(x, noise, rows[i], scale, *given, learned=learned)
            else:
                output = predict(x, scale, *given, learned=learned).clone()  # [B, C, H, W]
                if step.corrects and x_before is not None and output_before is not None:
                    x, output = x_before, (output_before + output) / 2
                x_before, output_before = x, output
                x = ops.denoise_update(x, output, noise, rows[i], clip=self.clip)
            yield x

    def scheduled(self, scheduler: Any, batch: Batch, before: Before) -> Iterator[Tensor]:
        """Yield the same after each step of a copy of a diffusers scheduler."""
        scheduler = unstepped(scheduler, batch.first)
        times = [float(t) for t in scheduler.timesteps[batch.first :]]
        conditions = Conditions(self.denoiser, batch, times, self.interval, self.table_bytes)
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            own = [_generator(self.seed, image) for image in batch.images]
            options["generator"] = own if batch.generators is None else batch.generators
        learned = getattr(getattr(scheduler, "config", None), "variance_type", None) in LEARNED_VARIANCES
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flow matching has neither
        x = self._start(batch) * (1.0 if batch.resumes else getattr(scheduler, "init_noise_sigma", 1.0))
        for i, t in enumerate(scheduler.timesteps[batch.first :]):
            x = before(batch.first + i, x)
            scale, given = conditions.at(i)
            output = self._output(scaled(x, t), *given).float()  # [B or 2B, C or 2C, H, W]
            prediction = ops.denoise_update(x, output, None, self.prediction_row, scale, self._guided(scale))
            variance = output[: len(x), x.shape[1] :]
            output = torch.cat([prediction, variance], dim=1) if learned else prediction
            x = step_scheduler(scheduler, output, t, x, options)
            yield x

    def _advance(
        self, x: Tensor, noise: Tensor | None, row: Tensor, scale: Tensor | None, *given: Tensor, learned: bool
    ) -> Tensor:
        output = self._output(x, *given, learned=learned)
        return ops.denoise_update(x, output, noise, row, scale, self._guided(scale), self.clip)

    def _predict(self, x: Tensor, scale: Tensor | None, *given: Tensor, learned: bool) -> Tensor:
        """Return the guided model's prediction for x, without a variance: [B, C, H, W] fp32."""
        output = self._output(x, *given, learned=learned)
        return ops.denoise_update(x, output, None, self.prediction_row, scale, self._guided(scale))

    def _output(self, x: Tensor, *given: Tensor, learned: bool = False) -> Tensor:
        """Return [B or 2B, C or 2C, H, W]; with ``learned`` the steps read a variance, which has to be there."""
        x = x.to(self.dtype)
        if len(given) == 1:
            return self.denoiser.model.forward_modulated(x, given[0])
        t, labels = given
        output = self.denoiser(x if len(labels) == len(x) else torch.cat([x, x]), t, labels)
        if learned and output.shape[1] == x.shape[1]:
            got = f"{x.shape[1]} channels from it, expected {2 * x.shape[1]}"
            raise ValueError(f"model: got {got}, as these steps read a variance: take steps of learn_sigma=False")
        return output

    def _guided(self, scale: Tensor | None) -> int:
        return 0 if scale is None else self.guided_channels

    def _rows(self, updates: Sequence[Update]) -> Tensor:
        return torch.tensor(updates, dtype=torch.float32, device=self.device)

    def _start(self, batch: Batch) -> Tensor:
        return self._noise(batch) if batch.latents is None else batch.latents

    def _noise(self, batch: Batch, step: int = 0) -> Tensor:
        shape = self.denoiser.config.input_shape
        if batch.generators is None:
            return image_noise(shape, batch.images, self.seed, step).to(self.device)
        return generated_noise((len(batch.labels), *shape), batch.generators).to(self.device)


def _generator(seed: int, image: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, image]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
