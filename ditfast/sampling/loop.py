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

from ..diffusion.solvers import Step
from ..model import DiT
from ..modulation_table import BUDGET_BYTES, offloaded_conditioning
from .run import Batch, Run


def sample(
    model: DiT,
    steps: Sequence[Step],
    labels: Tensor,
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
        labels: [B] integer classes.
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
        config = self.model.config
        if not 0 <= self._channels <= config.in_channels:
            raise ValueError(f"guidance_channels: got {self._channels}, expected 0..{config.in_channels}")
        if self.offload_conditioning and not (self.table_bytes and config.modulation_vectors):
            raise ValueError(
                "offload_conditioning: got True, but without a table, or without adaLN, the steps need all weights"
            )
        if self.scheduler is None and not self.steps:
            raise ValueError("steps: got none, expected those of a solver, such as ditfast.diffusion.steps(process, 'ddpm')")

    @torch.inference_mode()
    def __call__(
        self,
        labels: Tensor,
        *,
        cfg_scale: float | Sequence[float] = 1.0,
        images: Sequence[int] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """A batch: [B, C, H, W] fp32 on the model's device."""
        numbers = list(range(len(labels))) if images is None else list(images)
        scales = _scales(cfg_scale, len(labels))
        _check(self.model, labels, numbers, scales)
        run, size = self._run, 1 if self.batch_invariant else max(1, len(labels))
        parts = []
        with offloaded_conditioning(self.model) if self.offload_conditioning else contextlib.nullcontext():
            for start in range(0, max(1, len(labels)), size):
                place = slice(start, start + size)
                scale = None if scales is None else scales[place].to(run.device)
                batch = Batch(labels[place].to(run.device), numbers[place], scale)
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


def _scales(cfg_scale: float | Sequence[float], count: int) -> Tensor | None:
    """[B] fp32; None where nothing is guided."""
    scales = torch.as_tensor(cfg_scale, dtype=torch.float32)
    if scales.dim() > 1 or (scales.dim() == 1 and len(scales) != count) or not scales.isfinite().all():
        raise ValueError(f"cfg_scale: got {cfg_scale}, expected a finite number, or one for each of the {count} labels")
    return None if bool((scales == 1).all()) else scales.expand(count).contiguous()


def _check(model: DiT, labels: Tensor, images: Sequence[int], scales: Tensor | None) -> None:
    config = model.config
    if model.training:
        raise ValueError("model: got a model in training mode, expected model.eval()")
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"labels: got {tuple(labels.shape)} {labels.dtype}, expected [B] integers")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < config.label_rows:
        raise ValueError(f"labels: got {int(labels.min())}..{int(labels.max())}, expected 0..{config.label_rows - 1}")
    if len(images) != len(labels):
        raise ValueError(f"images: got {len(images)} numbers, expected {len(labels)}, one for each label")
    if scales is not None and config.label_rows == config.num_classes:
        raise ValueError("cfg_scale: this model has no null class to guide away from, expected 1")
