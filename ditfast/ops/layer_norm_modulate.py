"""LayerNorm without weight or bias, then the adaptive scale and shift of adaLN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..argument_checks import check_modulation, check_number, check_tokens, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from ..plain import PLAIN_TYPES
from ..torch_modes import computes_now, needs_gradient
from .joint_backward import joint_backward

# Elements; measured on two cores of a Zen 4: above the first a call's overhead no longer shows, above the second the
# temporaries leave the cache.
SMALLEST_ONE_PASS_SAMPLE = 16 * 1024
LARGEST_SLICE = 64 * 1024
_PLAIN = (*PLAIN_TYPES, type(None))  # of vectors; subclasses may not take what is written in place


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
    return _op(x, shift, scale, eps)


def _select(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, training: bool) -> str:
    check_tokens("x", x)
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    check_number("eps", eps, 0)
    return select_backend(x, "layer_norm_modulate", token_rows(x), tuple(x.shape[1:]), training)


def torch_layer_norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    if shift is None and scale is None:
        exact = x.float() if x.device.type == "cpu" else x  # as in _weighted_layer_norm
        return F.layer_norm(exact, x.shape[-1:], eps=eps).to(x.dtype).contiguous()
    at_once = x.device.type == "cpu" and x.numel() and not needs_gradient(x, shift, scale) and computes_now()
    if at_once and type(x) is Tensor and all(type(vector) in _PLAIN for vector in (shift, scale)):
        return _cpu_version(x, shift, scale, eps)
    return _normalise_then_modulate(x, shift, scale, eps)


def _normalise_then_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    if scale is not None:
        y = y * (1 + per_token(scale))
    if shift is not None:
        y = y + per_token(shift)
    return y.to(x.dtype)


def _cpu_version(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    """A sample at a time where that is worth a call; small samples in slices whose fp32 temporaries stay in cache."""
    B, T, D = x.shape
    per_sample = (shift is None or shift.dim() == 2) and (scale is None or scale.dim() == 2)
    one_pass = per_sample and (T * D >= SMALLEST_ONE_PASS_SAMPLE or B == 1)
    step = _weighted_layer_norm if one_pass else _in_place
    size = 1 if one_pass else max(1, LARGEST_SLICE // (T * D))
    if size >= B:
        return step(x, shift, scale, eps).to(x.dtype).contiguous()
    out = x.new_empty(x.shape)
    for start in range(0, B, size):
        i = slice(start, start + size)
        out[i] = step(x[i], None if shift is None else shift[i], None if scale is None else scale[i], eps)
    return out


def _weighted_layer_norm(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    """Compute the op for one sample [1, T, D] by torch's layer norm alone.

    On the CPU it takes fp32 weights beside bf16 activations too, but scales them before it centres them: rows without variance
    would be off by their rounding, a thousand times.
    """
    weight = None if scale is None else scale[0].float() + 1
    bias = None if shift is None else shift[0].float()
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def _in_place(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    if scale is not None:
        y.mul_(1 + per_token(scale))
    if shift is not None:
        y.add_(per_token(shift))
    return y


def per_token(vector: Tensor) -> Tensor:
    """fp32 [B, 1, D] or [B, T, D]: a modulation as it broadcasts over tokens."""
    return (vector if vector.dim() == 3 else vector[:, None]).float()


def empty_stats(x: Tensor, training: bool) -> Tensor:
    return x.new_empty((*x.shape[:2], 3) if training else (0,), dtype=torch.float32)


def _fake(x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, training: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), empty_stats(x, training)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], shift, scale)


def _backward(ctx: Any, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
    x, stats, shift, scale = ctx.saved_tensors
    dx, _, _, dshift, dscale = joint_backward(dy, None, x, stats, None, None, shift, scale)
    return dx, dshift, dscale, None, None


_triton = TritonOp(
    "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, float eps, bool training) -> (Tensor, Tensor)",
    _fake,
    save=_save,
    backward=_backward,
    outputs=1,
)
_op = Op(_select, _triton, torch=torch_layer_norm_modulate)
