"""Sinusoidal features of timesteps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config import TIMESTEP_FEATURES
from .dispatch import define_op, needs_gradient, route


def timestep_embedding(t: Tensor, dim: int = TIMESTEP_FEATURES, frequency_divisor: int | None = None) -> Tensor:
    """Sinusoidal features of timesteps, cosines first: fp32 [B, dim] (Ho et al. 2020; Vaswani et al. 2017).

    Args:
        t: [B] timesteps up to 10^8, any real dtype; fractions are kept.
        dim: number of features, even.
        frequency_divisor: how finely the frequencies 1 .. 1/10000 are cut; dim // 2 unless given (see ``Flavour``).

    Raises:
        ValueError: t is not one-dimensional or not real, or dim is odd.
    """
    if t.dim() != 1:
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected [B]")
    if t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"t: got dtype {t.dtype}, expected real timesteps")
    if dim % 2:
        raise ValueError(f"dim: got {dim}, expected an even number")
    half = dim // 2
    # Computed by torch on either backend: one rounding more or less of a frequency shows at large timesteps.
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * index / (frequency_divisor or half))  # [dim/2]
    if route(frequencies, "timestep_embedding", len(t), (dim,), needs_gradient(t)) == "torch":
        angles = t.float()[:, None] * frequencies  # [B, dim/2]
        return torch.cat([angles.cos(), angles.sin()], dim=1)
    return _op(t, frequencies)


def _fake(t: Tensor, frequencies: Tensor) -> Tensor:
    return frequencies.new_empty(t.shape[0], 2 * frequencies.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _backward_op(dy, *ctx.saved_tensors), None


def _backward_fake(dy: Tensor, t: Tensor, frequencies: Tensor) -> Tensor:
    return t.new_empty(t.shape)


_op = define_op("timestep_embedding(Tensor t, Tensor frequencies) -> Tensor", _fake, save=_save, backward=_backward)
_backward_op = define_op("timestep_embedding_backward(Tensor dy, Tensor t, Tensor frequencies) -> Tensor", _backward_fake)
