"""The last linear of a sublayer with the sublayer's end, gate and residual, in its epilogue."""

from __future__ import annotations

from torch import Tensor

from ..argument_checks import check_branch, check_linear, check_modulation, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
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
    return _op(x, weight, bias, residual, gate)


def _select(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor | None, training: bool) -> str:
    check_linear(x, weight, bias)
    check_branch("residual", residual, x, (*x.shape[:2], len(bias)))
    check_modulation("gate", gate, residual)
    if training:
        return "torch"
    return select_backend(x, "linear_gated_residual", token_rows(x), tuple(weight.shape))


def _two_ops(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    return gated_residual(residual, linear(x, weight, bias), gate)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    return residual.new_empty(residual.shape)


_triton = TritonOp(
    "linear_gated_residual(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor? gate) -> Tensor", _fake
)
_op = Op(_select, _triton, autocast=slice(0, 3), torch=_two_ops)
