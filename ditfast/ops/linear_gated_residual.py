"""The last linear of a sublayer with the sublayer's end, gate and residual, in its epilogue."""

from __future__ import annotations

from torch import Tensor

from .checks import check_branch, check_linear, check_modulation, token_rows
from .dispatch import define_op, needs_gradient, route, under_autocast
from .gated_residual import gated_residual
from .linear import linear


def linear_gated_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """``residual + gate * (x @ weight.T + bias)``, without a pass of its own over the sublayer's output.

    For gradients it is ``gated_residual(residual, linear(x, weight, bias), gate)``: the gate's needs the branch itself.

    Args:
        x: [B, T, K] fp32, fp16 or bf16, unit inner stride.
        weight: [N, K], of the dtype of x.
        bias: [N], of the dtype of x.
        residual: [B, T, N], any of the dtypes, unit inner stride.
        gate: [B, N] or [B, T, N], any of the dtypes, any outer strides; None for a plain residual.

    Returns:
        [B, T, N], contiguous, of the dtype of residual.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    x, weight, bias = under_autocast(x, weight, bias)
    check_linear(x, weight, bias)
    check_branch("residual", residual, x, (*x.shape[:2], len(bias)))
    check_modulation("gate", gate, residual)
    training = needs_gradient(x, weight, bias, residual, gate)
    if training or route(x, "linear_gated_residual", token_rows(x), tuple(weight.shape)) == "torch":
        return gated_residual(residual, linear(x, weight, bias), gate)
    return _op(x, weight, bias, residual, gate)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    return residual.new_empty(residual.shape)


_op = define_op("linear_gated_residual(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor? gate) -> Tensor", _fake)
