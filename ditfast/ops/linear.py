"""A linear layer; by default the library's GEMM, which is hard to beat at it, else ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..argument_checks import check_linear, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .cpu_products import linear_fake, torch_linear


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
    return _op(x, weight, bias)


def _select(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> str:
    check_linear(x, weight, bias)
    return select_backend(x, "linear", token_rows(x), tuple(weight.shape), training)


def _torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch_linear(x, weight, bias).contiguous()


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(*operands(ctx, x, weight))


def operands(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of x and weight what the gradients of the other need: next to a frozen weight, x is not kept."""
    return x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return needed_gradients(ctx, 3, _backward_op, dy, *ctx.saved_tensors)


def needed_gradients(ctx: Any, count: int, backward_op: TritonOp, *args: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first ``count`` inputs, None in place of those that nobody needs."""
    needed = list(ctx.needs_input_grad[:count])
    gradients = iter(backward_op(*args, needed))
    return tuple(next(gradients) if need else None for need in needed)


def backward_fake(dy: Tensor, x: Tensor | None, weight: Tensor | None, needed: list[bool]) -> list[Tensor]:
    gradients = []
    if needed[0] and weight is not None:
        gradients.append(dy.new_empty((*dy.shape[:-1], weight.shape[1])))
    if needed[1] and x is not None:
        gradients.append(dy.new_empty((dy.shape[-1], x.shape[-1])))
    return [*gradients, dy.new_empty(dy.shape[-1:])] if needed[2] else gradients


_triton = TritonOp("linear(Tensor x, Tensor weight, Tensor bias) -> Tensor", linear_fake, save=_save, backward=_backward)
_op = Op(_select, _triton, autocast=slice(0, 3), torch=_torch)
_backward_op = TritonOp("linear_backward(Tensor dy, Tensor? x, Tensor? weight, bool[] needed) -> Tensor[]", backward_fake)
