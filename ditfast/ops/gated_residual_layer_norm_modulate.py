"""The joint between two sublayers: the end of one and the start of the next, in one kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..argument_checks import check_branch, check_modulation, check_number, check_tokens, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .gated_residual import cast_to, torch_gated_residual
from .joint_backward import joint_backward
from .layer_norm_modulate import empty_stats, torch_layer_norm_modulate


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
    return _op(x, h, gate, shift, scale, eps)


def _select(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float, training: bool
) -> str:
    check_tokens("x", x)
    check_branch("h", h, x)
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        check_modulation(name, vector, x)
    check_number("eps", eps, 0)
    return select_backend(x, "gated_residual_layer_norm_modulate", token_rows(x), tuple(x.shape[1:]), training)


def _torch(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x_new = torch_gated_residual(x, h, gate)
    return x_new, torch_layer_norm_modulate(x_new, shift, scale, eps)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), empty_stats(x, training=others[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, h, gate, shift, scale, _, _ = inputs
    x_new, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.branch_dtype = h.dtype
    ctx.save_for_backward(x_new, stats, None if gate is None else h, gate, shift, scale)


def _backward(ctx: Any, dx_new: Tensor | None, du: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x_new, stats, h, gate, shift, scale = ctx.saved_tensors
    dx, dh, *vectors = joint_backward(du, dx_new, x_new, stats, h, gate, shift, scale)
    return dx, cast_to(dh, ctx.branch_dtype), *vectors, None, None


_triton = TritonOp(
    "gated_residual_layer_norm_modulate(Tensor x, Tensor h, Tensor? gate, Tensor? shift, Tensor? scale, float eps,"
    " bool training) -> (Tensor, Tensor, Tensor)",
    _fake,
    save=_save,
    backward=_backward,
    outputs=2,
)
_op = Op(_select, _triton, torch=_torch)
