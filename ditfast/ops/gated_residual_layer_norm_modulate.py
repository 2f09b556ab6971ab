"""The joint between two sublayers: the end of one and the start of the next, in one kernel."""

from __future__ import annotations

from torch import Tensor

from .checks import check_branch, check_modulation, check_tokens
from .dispatch import define_op, takes_torch
from .gated_residual import torch_gated_residual
from .layer_norm_modulate import torch_layer_norm_modulate


def gated_residual_layer_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``x_new = x + gate * h`` and ``u = LayerNorm(x_new) * (1 + scale) + shift`` (Peebles & Xie 2022, adaLN-Zero).

    Args:
        x: [B, T, D] fp32, fp16 or bf16, unit inner stride: the residual stream.
        h: [B, T, D], the sublayer's output; any of the dtypes, unit inner stride.
        gate: [B, D], or [B, T, D] for one vector a token; any of the dtypes, any outer strides; None for a plain residual.
        shift: as gate; None for none.
        scale: as gate; None for none.
        eps: added to the variance.

    Returns:
        x_new and u, both [B, T, D], contiguous, of the dtype of x. Arithmetic is fp32 with one rounding each; u is computed
        from the rounded x_new.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    check_tokens("x", x)
    check_branch("h", h, x)
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        check_modulation(name, vector, x)
    if takes_torch(x, h, gate, shift, scale):
        return _torch_version(x, h, gate, shift, scale, eps)
    return _op(x, h, gate, shift, scale, eps)


def _torch_version(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x_new = torch_gated_residual(x, h, gate)
    return x_new, torch_layer_norm_modulate(x_new, shift, scale, eps)


def _fake(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_op = define_op(
    "gated_residual_layer_norm_modulate(Tensor x, Tensor h, Tensor? gate, Tensor? shift, Tensor? scale, float eps)"
    " -> (Tensor, Tensor)",
    _torch_version,
    _fake,
)
