"""Classifier-free guidance of a model's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_dtype, check_integer, check_number, check_tensor
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend


def classifier_free_guidance(out: Tensor, scale: float, channels: int) -> Tensor:
    """``unconditional + scale * (conditional - unconditional)`` (Ho & Salimans 2022), for the first channels.

    Args:
        out: [2B, C, H, W] fp32, fp16 or bf16: the conditional half, then the unconditional one.
        scale: 1 gives the conditional half exactly, 0 the unconditional one.
        channels: how many of the first channels are guided; the others keep what their half holds.

    Returns:
        [2B, C, H, W], contiguous, of the dtype of out: the guided channels in both halves.

    Raises:
        ValueError: out's shape or dtype, or more channels than it has; the message names it.
    """
    return _op(out, scale, channels)


def _select(out: Tensor, scale: float, channels: int, training: bool) -> str:
    check_tensor("out", out, "[2B, C, H, W]")
    if out.dim() != 4:
        raise ValueError(f"out: got shape {tuple(out.shape)}, expected [2B, C, H, W]")
    if out.shape[0] % 2:
        raise ValueError(f"out: got a batch of {out.shape[0]}, expected an even one: conditional, then unconditional")
    check_dtype("out", out)
    check_number("scale", scale)
    check_integer("channels", channels, 0, out.shape[1])
    return select_backend(out, "classifier_free_guidance", out.shape[0], (out.shape[1:].numel(),), training)


def torch_classifier_free_guidance(out: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    conditional, unconditional = out[:, :channels].float().chunk(2)  # 2 x [B, channels, H, W], fp32 for the gradient's sum
    guided = torch.lerp(unconditional, conditional, scale).repeat(2, 1, 1, 1)  # [2B, channels, H, W]
    return torch.cat([guided.to(out.dtype), out[:, channels:]], dim=1)  # [2B, C, H, W]


def _fake(out: Tensor, scale: float, channels: int) -> Tensor:
    return out.new_empty(out.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.scale, ctx.channels = inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _backward_op(dy, ctx.scale, ctx.channels), None, None


_triton = TritonOp(
    "classifier_free_guidance(Tensor out, float scale, int channels) -> Tensor", _fake, save=_save, backward=_backward
)
_op = Op(_select, _triton, torch=torch_classifier_free_guidance)
_backward_op = TritonOp("classifier_free_guidance_backward(Tensor dy, float scale, int channels) -> Tensor", _fake)
