"""The first half of the MLP: a linear layer with GELU in its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_parameter, check_tokens
from .dispatch import define_op, takes_torch


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``GELU(x @ weight.T + bias)`` with the tanh approximation (Hendrycks & Gimpel 2016, as the paper's MLP uses it).

    Args:
        x: [B, T, K] fp32, fp16 or bf16, unit inner stride.
        weight: [N, K], of the dtype of x.
        bias: [N], of the dtype of x.

    Returns:
        [B, T, N], contiguous, of the dtype of x, or autocast's. The product accumulates in fp32; fp32 inputs are not
        rounded to tf32.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    if torch.is_autocast_enabled(x.device.type):  # as torch does for F.linear; the op behind does not see autocast
        x, weight, bias = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight, bias))
    check_tokens("x", x)
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [N, K]")
    check_parameter("weight", weight, x, (weight.shape[0], x.shape[2]))
    check_parameter("bias", bias, x, (weight.shape[0],))
    if takes_torch(x, weight, bias):
        return torch_linear_gelu(x, weight, bias)
    return _op(x, weight, bias)


def torch_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh").contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_op = define_op("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor", torch_linear_gelu, _fake)
