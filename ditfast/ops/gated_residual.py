"""The end of a sublayer: its output, gated, is added to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_branch, check_modulation, check_tokens, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .joint_backward import joint_backward
from .layer_norm_modulate import per_token


def gated_residual(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """``x + gate * h`` (Peebles & Xie 2022, adaLN-Zero's alpha), in fp32 with one rounding at the end.

    Args:
        x: [B, T, D] fp32, fp16 or bf16, unit inner stride: the residual stream.
        h: [B, T, D], the sublayer's output; any of the dtypes, unit inner stride.
        gate: [B, D], or [B, T, D] for one vector a token; any of the dtypes, any outer strides; None for a plain residual.

    Returns:
        [B, T, D], contiguous, of the dtype of x.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    return _op(x, h, gate)


def _select(x: Tensor, h: Tensor, gate: Tensor | None, training: bool) -> str:
    check_tokens("x", x)
    check_branch("h", h, x)
    check_modulation("gate", gate, x)
    return select_backend(x, "gated_residual", token_rows(x), tuple(x.shape[1:]), training)


def torch_gated_residual(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    if h.dtype == x.dtype and gate is None:
        return (x + h).contiguous()
    if gate is not None and gate.dtype == h.dtype == x.dtype:  # one pass, and one rounding: torch computes it in fp32
        return torch.addcmul(x, gate if gate.dim() == 3 else gate.unsqueeze(1), h).contiguous()
    branch = h.float() if gate is None else per_token(gate) * h.float()
    return (x.float() + branch).to(x.dtype).contiguous()


def _fake(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, h, gate = inputs
    ctx.branch_dtype = h.dtype
    ctx.save_for_backward(None if gate is None else h, gate)


def _backward(ctx: Any, dx_new: Tensor) -> tuple[Tensor | None, ...]:
    h, gate = ctx.saved_tensors
    dx, dh, dgate, _, _ = joint_backward(None, dx_new, None, None, h, gate, None, None)
    return dx, cast_to(dh, ctx.branch_dtype), dgate


def cast_to(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


_triton = TritonOp("gated_residual(Tensor x, Tensor h, Tensor? gate) -> Tensor", _fake, save=_save, backward=_backward)
_op = Op(_select, _triton, torch=torch_gated_residual)
