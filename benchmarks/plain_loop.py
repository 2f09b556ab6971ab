"""A sampling loop as one writes it, which ditfast's is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ditfast import ops
from ditfast.diffusion import Step, apply_update

Loop: TypeAlias = Iterator[Tensor]


def plain_loop(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: Sequence[Step],
    labels: Tensor,
    cfg_scale: float,
    channels: int,
    noise: Callable[[int], Tensor],
    *,
    clip: bool = False,
    fused_update: bool = False,
) -> Loop:
    """Both halves through the model, then guidance, then the step, in torch; gives x [B, C, H, W] fp32 after each step.

    Args:
        model: x [2B, C, H, W], t [2B], labels [2B] -> [2B, C or 2C, H, W].
        steps: of a solver that takes one call a step.
        labels: [2B]: the classes, then as often the null class.
        channels: how many of the first are guided.
        noise: of a step, [B, C, H, W]; 0 is where sampling starts from.
        clip: clamp the predicted x_0 to [-1, 1].
        fused_update: guidance and step in one ``ops.denoise_update``.
    """
    rows = torch.tensor([step.update for step in steps], device=labels.device)
    scale = torch.full((len(labels) // 2,), cfg_scale, device=labels.device)
    x = noise(0)
    for i, step in enumerate(steps):
        drawn = noise(i + 1) if step.update.adds_noise else None
        t = torch.full((len(labels),), step.t, device=labels.device)
        output = model(torch.cat([x, x]), t, labels)
        if fused_update:
            x = ops.denoise_update(x, output, drawn, rows[i], scale, channels, clip)
        else:
            conditional, unconditional = output.chunk(2)
            guided = unconditional[:, :channels] + cfg_scale * (conditional[:, :channels] - unconditional[:, :channels])
            x = apply_update(x, torch.cat([guided, conditional[:, channels:]], dim=1), drawn, step.update, clip)
        yield x
