"""A linear layer; by default the library's GEMM, which is hard to beat at it, else ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .checks import check_linear
from .dispatch import define_op, takes_torch, under_autocast


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [B, T, K] fp32, fp16 or bf16, unit inner stride.
        weight: [N, K], of the dtype of x.
        bias: [N], of the dtype of x.

    Returns:
        [B, T, N], contiguous, of the dtype of x, or autocast's. The product accumulates in fp32; the Triton kernel does not
        round fp32 inputs to tf32 (on the torch backend that is torch's setting).

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    x, weight, bias = under_autocast(x, weight, bias)
    check_linear(x, weight, bias)
    if takes_torch("linear", x):
        return F.linear(x, weight, bias).contiguous()
    return _op(x, weight, bias)


def linear_backward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the first three inputs, which are x, weight and bias; None for those that need none."""
    needed = list(ctx.needs_input_grad[:3])
    found = iter(_backward_op(dy, x, weight, needed))
    return tuple(next(found) if need else None for need in needed)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return linear_backward(ctx, dy, *ctx.saved_tensors)


def backward_fake(dy: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> list[Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [x.new_empty(shape) for shape, need in zip(shapes, needed, strict=True) if need]


_op = define_op("linear(Tensor x, Tensor weight, Tensor bias) -> Tensor", _fake, save=_save, backward=_backward)
_backward_op = define_op("linear_backward(Tensor dy, Tensor x, Tensor weight, bool[] needed) -> Tensor[]", backward_fake)
