"""Checks of tensors that ops take: shape, dtype, device, strides; errors name the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..argument_checks import check_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tokens(name: str, x: Tensor) -> None:
    """Raise unless x is [B, T, D] with unit inner stride."""
    check_tensor(name, x, "[B, T, D]")
    shape = x.shape
    if len(shape) != 3:
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected [B, T, D]")
    _check_not_empty(name, x, shape[2:])
    check_dtype(name, x)
    _check_inner_stride(name, x)


def token_rows(x: Tensor) -> int:
    """Return B * T of [B, T, ...]."""
    return x.shape[0] * x.shape[1]


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}: got dtype {tensor.dtype}, expected float32, float16 or bfloat16 (ditfast.reference works in float64)"
        )


def check_parameter(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], of: str = "x") -> None:
    """Raise unless a tensor has a shape that follows from x, and its dtype and device; ``of`` is what the op calls x."""
    check_tensor(name, tensor, shape)
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape} for {of} {tuple(x.shape)}")
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected {x.dtype}, as {of}")
    _check_device(name, tensor, x, of)
    _check_inner_stride(name, tensor)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor, prefix: str = "", features: int | None = None, of: str = "x") -> None:
    """weight [N, K] and bias [N] for x [B, T, K]; K is ``features`` where x is not what the weight multiplies."""
    check_tokens(of, x)
    check_weight(f"{prefix}weight", weight)
    check_parameter(f"{prefix}weight", weight, x, (weight.shape[0], x.shape[2] if features is None else features), of)
    check_parameter(f"{prefix}bias", bias, x, (weight.shape[0],), of)


def check_weight(name: str, weight: Tensor) -> None:
    """Raise unless a weight is [N, K], neither of them 0."""
    check_tensor(name, weight, "[N, K]")
    if weight.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected [N, K]")
    _check_not_empty(name, weight, weight.shape)


def check_branch(name: str, h: Tensor, x: Tensor, shape: tuple[int, ...] | None = None, of: str = "x") -> None:
    """Raise unless h has ``shape`` (default: x's) on x's device, in any dtype: autocast brings bf16 beside an fp32 stream."""
    expected = tuple(x.shape) if shape is None else shape
    check_tensor(name, h, expected)
    if h.shape != expected:
        raise ValueError(f"{name}: got shape {tuple(h.shape)}, expected {expected} for {of} {tuple(x.shape)}")
    check_dtype(name, h)
    _check_device(name, h, x, of)
    _check_inner_stride(name, h)


def check_modulation(name: str, vector: Tensor | None, x: Tensor) -> None:
    """[B, D] for one vector a sample or [B, T, D] for one a token, in any of the dtypes; or None."""
    if vector is None:
        return
    check_tensor(name, vector, "[B, D] or [B, T, D], or None")
    shape, whole = vector.shape, x.shape
    if shape != whole and shape != whole[::2]:
        B, T, D = whole
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected {(B, D)} or {(B, T, D)} for x {tuple(whole)}")
    check_dtype(name, vector)
    _check_device(name, vector, x)
    _check_inner_stride(name, vector)


def _check_not_empty(name: str, tensor: Tensor, sizes: tuple[int, ...]) -> None:
    if 0 in sizes:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected features; only batches and sequences may be empty")


def _check_device(name: str, tensor: Tensor, x: Tensor, of: str = "x") -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {x.device}, as {of}")


def _check_inner_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
        raise ValueError(
            f"{name}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected a unit inner stride: "
            f"call {name}.contiguous()"
        )
