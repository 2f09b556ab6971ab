"""The denoising loop: from labels to images, doing nothing in a step that can be done once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.solvers import Step
from ..model import DiT
from ..modulation_table import BUDGET_BYTES, offloaded_conditioning
from .run import Batch, Run


@torch.inference_mode()
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
    numbers = list(range(len(labels))) if images is None else list(images)
    channels = model.config.guidance_channels if guidance_channels is None else guidance_channels
    scales = _scales(cfg_scale, len(labels))
    _check(model, labels, numbers, scales, channels)
    if offload_conditioning and not (table_bytes and model.config.modulation_vectors):
        raise ValueError("offload_conditioning: got True, but without a table, or without adaLN, the steps need all weights")
    if scheduler is None and not steps:
        raise ValueError("steps: got none, expected those of a solver, such as ditfast.diffusion.steps(process, 'ddpm')")
    run = Run(model, clip, cfg_interval, channels, seed, table_bytes)
    size = 1 if batch_invariant else max(1, len(labels))
    parts = []
    with offloaded_conditioning(model) if offload_conditioning else contextlib.nullcontext():
        for start in range(0, max(1, len(labels)), size):
            place = slice(start, start + size)
            scale = None if scales is None else scales[place].to(run.device)
            batch = Batch(labels[place].to(run.device), numbers[place], scale)
            states = run.solved(steps, batch) if scheduler is None else run.scheduled(scheduler, batch)
            for x in states:
                latest = x
                on_step()
            parts.append(latest.clone())
    return torch.cat(parts)


def _scales(cfg_scale: float | Sequence[float], count: int) -> Tensor | None:
    """[B] fp32; None where nothing is guided."""
    scales = torch.as_tensor(cfg_scale, dtype=torch.float32)
    if scales.dim() > 1 or (scales.dim() == 1 and len(scales) != count) or not scales.isfinite().all():
        raise ValueError(f"cfg_scale: got {cfg_scale}, expected a finite number, or one for each of the {count} labels")
    return None if bool((scales == 1).all()) else scales.expand(count).contiguous()


def _check(model: DiT, labels: Tensor, images: Sequence[int], scales: Tensor | None, channels: int) -> None:
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
    if not 0 <= channels <= config.in_channels:
        raise ValueError(f"guidance_channels: got {channels}, expected 0..{config.in_channels}")
