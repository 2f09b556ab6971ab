"""The MLP of a block: fc1, GELU, fc2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..argument_checks import check_linear, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .cpu_products import torch_linear
from .linear import linear, needed_gradients
from .linear_gelu import linear_gelu
from .torch_gelu import torch_gelu


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """``linear(linear_gelu(x, fc1), fc2)``; in Triton the backward keeps one tensor of the hidden layer instead of two.

    Args:
        x: [B, T, K] fp32, fp16 or bf16, unit inner stride.
        fc1_weight: [H, K], of the dtype of x.
        fc1_bias: [H].
        fc2_weight: [N, H].
        fc2_bias: [N].

    Returns:
        [B, T, N], contiguous, of the dtype of x, or autocast's.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    return _op(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def _select(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, training: bool) -> str:
    check_linear(x, fc1_weight, fc1_bias, prefix="fc1_")
    check_linear(x, fc2_weight, fc2_bias, prefix="fc2_", features=fc1_bias.shape[0])
    rows, (hidden, K), N = token_rows(x), fc1_weight.shape, len(fc2_bias)
    if training:
        return select_backend(x, "mlp", rows, (hidden, N, K), training=True)
    backends = {select_backend(x, "linear_gelu", rows, (hidden, K)), select_backend(x, "linear", rows, (N, hidden))}
    return "triton" if backends == {"triton"} else "linears"


def _linears(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    return linear(linear_gelu(x, fc1_weight, fc1_bias), fc2_weight, fc2_bias)


def _torch(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    hidden = torch_gelu(torch_linear(x, fc1_weight, fc1_bias))
    return torch_linear(hidden, fc2_weight, fc2_bias).contiguous()


def _fake(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    z_shape = (*x.shape[:-1], len(fc1_bias)) if training else (0,)
    return x.new_empty((*x.shape[:-1], len(fc2_bias))), x.new_empty(z_shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, fc1_weight, _, fc2_weight, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], fc1_weight, fc2_weight)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *needed_gradients(ctx, 5, _backward_op, dy, *ctx.saved_tensors), None


def _backward_fake(
    dy: Tensor, x: Tensor, z: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, needed: list[bool]
) -> list[Tensor]:
    shapes = (x.shape, fc1_weight.shape, fc1_weight.shape[:1], fc2_weight.shape, fc2_weight.shape[:1])
    return [x.new_empty(shape) for shape, need in zip(shapes, needed, strict=True) if need]


_triton = TritonOp(
    "mlp(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, bool training) -> (Tensor, Tensor)",
    _fake,
    save=_save,
    backward=_backward,
    outputs=1,
)
_op = Op(_select, _triton, autocast=slice(0, 5), torch=_torch, linears=_linears)
_backward_op = TritonOp(
    "mlp_backward(Tensor dy, Tensor x, Tensor z, Tensor fc1_weight, Tensor fc2_weight, bool[] needed) -> Tensor[]",
    _backward_fake,
)
