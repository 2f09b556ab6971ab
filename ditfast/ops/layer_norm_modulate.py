"""LayerNorm without weight or bias, then the adaptive scale and shift of adaLN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_modulation, check_tokens
from .dispatch import define_op, needs_gradient


def layer_norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float = 1e-6) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` (Peebles & Xie 2022, adaLN), in fp32 with one rounding at the end.

    Args:
        x: [B, T, D] fp32, fp16 or bf16, unit inner stride.
        shift: [B, D], or [B, T, D] for one vector a token; any of the dtypes, any outer strides; None for none.
        scale: as shift.
        eps: added to the variance.

    Returns:
        [B, T, D], contiguous, of the dtype of x.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    check_tokens("x", x)
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    if needs_gradient(x, shift, scale):
        return torch_layer_norm_modulate(x, shift, scale, eps)
    return _op(x, shift, scale, eps)


def torch_layer_norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    width = x.shape[-1:]
    if shift is None and scale is None:
        return F.layer_norm(x, width, eps=eps).contiguous()
    if x.device.type == "cpu" and _one_per_sample(shift) and _one_per_sample(scale):
        # CPU's layer norm takes fp32 weights beside bf16 activations: the whole op is its one pass, a sample at a time.
        weights = [None] * len(x) if scale is None else (1 + scale.float()).unbind()
        biases = [None] * len(x) if shift is None else shift.float().unbind()
        return _join([F.layer_norm(*args, eps) for args in zip(x.split(1), [width] * len(x), weights, biases, strict=True)], x)
    y = F.layer_norm(x.float(), width, eps=eps)
    if scale is not None:
        y = y * (1 + per_token(scale))
    if shift is not None:
        y = y + per_token(shift)
    return y.to(x.dtype)


def per_token(vector: Tensor) -> Tensor:
    """fp32 [B, 1, D] or [B, T, D]: a modulation as it broadcasts over tokens."""
    return (vector if vector.dim() == 3 else vector[:, None]).float()


def _one_per_sample(vector: Tensor | None) -> bool:
    return vector is None or vector.dim() == 2


def _join(samples: list[Tensor], like: Tensor) -> Tensor:
    if len(samples) == 1:
        return samples[0].contiguous()
    return torch.cat(samples) if samples else like.new_empty(like.shape)


def _fake(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_op = define_op(
    "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, float eps) -> Tensor", torch_layer_norm_modulate, _fake
)
