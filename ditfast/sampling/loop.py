"""The denoising loop: from labels to images, doing nothing in a step that can be done once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..argument_checks import LARGEST_SEED, as_bool, as_int, check_callable
from ..diffusion.solvers import Step
from ..model import DiT
from ..modulation_table import BUDGET_BYTES, offloaded_conditioning
from .checks import as_images, as_interval, as_labels, as_scales, check_model, check_scheduler, check_steps
from .run import Batch, Run


def sample(
    model: DiT,
    steps: Sequence[Step],
    labels: Tensor | Sequence[int],
    *,
    cfg_scale: float | Sequence[float] = 1.0,
    cfg_interval: tuple[float, float] = (-math.inf, math.inf),
    guidance_channels: int | None = None,
    seed: int = 0,
    images: Sequence[int] | None = None,
    clip: bool = False,
    table_bytes: int = BUDGET_BYTES,
    offload_conditioning: bool = False,
    batch_invariant: bool = False,
    scheduler: Any = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoises one image for each label.

    Args:
        model: in eval mode, on any device, of any of its dtypes; the state between steps is fp32.
        steps: of a solver, such as ``diffusion.steps(GaussianDiffusion("250"), "ddpm")``; not read with a ``scheduler``.
        labels: [B] integer classes, of any integer dtype, or a list of them.
        cfg_scale: strength of classifier-free guidance, one or one an image; where all are 1 the conditional model runs
            alone.
        cfg_interval: the lowest and highest time the model is told that are guided (Kynkäänniemi et al. 2024); other steps
            run the conditional model alone.
        guidance_channels: how many of the first channels are guided; the flavour's unless given (official: 3).
        seed: 0..2^64-1; with an image's number it decides its noise.
        images: [B] the images' numbers; 0, 1, ... unless given.
        clip: clamp the predicted x_0 to [-1, 1] (pixel-space models).
        table_bytes: memory for a ``ModulationTable``; 0 computes the vectors in each step.
        offload_conditioning: keep adaLN's weights in the host's memory meanwhile: a third of the model, of which the table
            brings one layer at a time to the device.
        batch_invariant: call the model with one image at a time, so that an image's bits do not depend on the batch (a
            library's GEMM may round differently for other numbers of rows); slower.
        scheduler: a diffusers scheduler, its timesteps set, that takes the steps instead. It draws what noise it wants from
            torch's generator.
        on_step: called after each step of each batch (progress).

    Returns:
        [B, C, H, W] fp32 on the model's device.

    Raises:
        ValueError: an argument; the message names it.
        TypeError: likewise, one of the wrong kind.
    """
    sampler = Sampler(
        model,
        steps,
        cfg_interval=cfg_interval,
        guidance_channels=guidance_channels,
        seed=seed,
        clip=clip,
        table_bytes=table_bytes,
        offload_conditioning=offload_conditioning,
        batch_invariant=batch_invariant,
        scheduler=scheduler,
    )
    return sampler(labels, cfg_scale=cfg_scale, images=images, on_step=on_step)


@dataclass(frozen=True)
class Sampler:
    """``sample`` of one batch after another: what one batch had captured as a CUDA graph, the next of its size replays.

    Fields are ``sample``'s arguments. A graph reads the weights where they were: a model that is moved, cast or changed in its
    layers needs another sampler.
    """

    model: DiT
    steps: Sequence[Step]
    cfg_interval: tuple[float, float] = (-math.inf, math.inf)
    guidance_channels: int | None = None
    seed: int = 0
    clip: bool = False
    table_bytes: int = BUDGET_BYTES
    offload_conditioning: bool = False
    batch_invariant: bool = False
    scheduler: Any = None

    def __post_init__(self) -> None:
        check_model(self.model)
        config = self.model.config
        given = {
            "cfg_interval": as_interval(self.cfg_interval),
            "seed": as_int("seed", self.seed, 0, LARGEST_SEED),
            "table_bytes": as_int("table_bytes", self.table_bytes, 0),
            **{name: as_bool(name, getattr(self, name)) for name in ("clip", "offload_conditioning", "batch_invariant")},
        }
        if self.guidance_channels is not None:
            given["guidance_channels"] = as_int("guidance_channels", self.guidance_channels, 0, config.in_channels)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if self.offload_conditioning and not (self.table_bytes and config.modulation_vectors):
            raise ValueError(
                "offload_conditioning: got True, but without a table, or without adaLN, the steps need all weights"
            )
        if self.scheduler is None:
            check_steps(self.steps)
        else:
            check_scheduler(self.scheduler)

    @torch.inference_mode()
    def __call__(
        self,
        labels: Tensor | Sequence[int],
        *,
        cfg_scale: float | Sequence[float] = 1.0,
        images: Sequence[int] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """A batch: [B, C, H, W] fp32 on the model's device."""
        config, run = self.model.config, self._run
        if self.model.training:
            raise ValueError("model: got a model in training mode, expected model.eval()")
        labels = as_labels(labels, config.label_rows, run.device)
        numbers = as_images(images, len(labels))
        scales = as_scales(cfg_scale, len(labels), run.device)
        if scales is not None and config.label_rows == config.num_classes:
            raise ValueError("cfg_scale: this model has no null class to guide away from, expected 1")
        check_callable("on_step", on_step)
        size = 1 if self.batch_invariant else max(1, len(labels))
        parts = []
        with offloaded_conditioning(self.model) if self.offload_conditioning else contextlib.nullcontext():
            for start in range(0, max(1, len(labels)), size):
                place = slice(start, start + size)
                batch = Batch(labels[place], numbers[place], None if scales is None else scales[place])
                states = run.solved(self.steps, batch) if self.scheduler is None else run.scheduled(self.scheduler, batch)
                for x in states:
                    latest = x
                    on_step()
                parts.append(latest.clone())
        return torch.cat(parts)

    @cached_property
    def _run(self) -> Run:
        return Run(self.model, self.clip, self.cfg_interval, self._channels, self.seed, self.table_bytes)

    @property
    def _channels(self) -> int:
        return self.model.config.guidance_channels if self.guidance_channels is None else self.guidance_channels
