"""The first half of the MLP: a linear layer with GELU in its epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_linear, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .cpu_products import torch_linear
from .linear import backward_fake, needed_gradients, operands
from .torch_gelu import torch_gelu


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``GELU(x @ weight.T + bias)`` with the tanh approximation (Hendrycks & Gimpel 2016, as the paper's MLP uses it).

    Args:
        x: [B, T, K] fp32, fp16 or bf16, unit inner stride.
        weight: [N, K], of the dtype of x.
        bias: [N], of the dtype of x.

    Returns:
        [B, T, N], contiguous, of the dtype of x, or autocast's. The product accumulates in fp32; the Triton kernel does not
        round fp32 inputs to tf32.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    return _op(x, weight, bias)


def _select(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> str:
    check_linear(x, weight, bias)
    return select_backend(x, "linear_gelu", token_rows(x), tuple(weight.shape), training)


def _torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch_gelu(torch_linear(x, weight, bias)).contiguous()


def _cublaslt(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Call cuBLASLt, whose epilogue has the tanh form; on the CPU the same function computes the other."""
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])


def _fake(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, y.new_empty(y.shape if training else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    x, weight = operands(ctx, x, weight)
    ctx.save_for_backward(x, output[1], weight)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *needed_gradients(ctx, 3, _backward_op, dy, *ctx.saved_tensors), None


def _backward_fake(dy: Tensor, x: Tensor | None, z: Tensor, weight: Tensor | None, needed: list[bool]) -> list[Tensor]:
    return backward_fake(dy, x, weight, needed)


_triton = TritonOp(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias, bool training) -> (Tensor, Tensor)",
    _fake,
    save=_save,
    backward=_backward,
    outputs=1,
)
_op = Op(_select, _triton, autocast=slice(0, 3), torch=_torch, cublaslt=_cublaslt)
_backward_op = TritonOp(
    "linear_gelu_backward(Tensor dy, Tensor? x, Tensor z, Tensor? weight, bool[] needed) -> Tensor[]", _backward_fake
)
