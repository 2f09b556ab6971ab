"""Several linear layers of one input in one call, for few rows: the adaLN modulations of all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_dtype, check_tensor, wrong_type
from ..dispatch.launchers import triton_kernels
from ..dispatch.op import Op, TritonOp, is_eager
from ..dispatch.selection import select_backend
from ..dispatch.shapes import GROUPED_ROWS
from ..torch_modes import autocast_dtype, computes_now, needs_gradient
from .cpu_products import in_fp32, torch_linear

MKL_ROWS = 8  # up to which MKL, which repacks its second operand, is faster with the weight first: 0.5 to 0.7 of the time
WIDENED_AT_ONCE = 2**20  # elements of a weight: 4 MiB in fp32 stay in the cache


def grouped_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """``[x @ weight.T + bias for weight, bias in zip(weights, biases)]``

    The Triton kernel reads each weight and bias where it is, from a table of their addresses on the device. A call makes the
    table anew if an address, shape, dtype or device is not what it was. CUDA graphs need a call before the capture, which
    makes the table, and keep it.

    Args:
        x: [M, K] fp32, fp16 or bf16.
        weights: each [N, K], of the dtype of x; N may differ.
        biases: each [N], of the dtype of x.

    Returns:
        One [M, N] for each weight, of the dtype of x, or autocast's; the inner stride is 1. Products accumulate in fp32; the
        Triton kernel does not round fp32 inputs to tf32. It takes at most 16 rows, without gradients and autocast, outside of
        compiled and traced graphs, and weights that are contiguous and aligned to 16 bytes; else torch multiplies by one weight
        at a time.

    Raises:
        ValueError: an argument's shape, dtype or device; the message names it.
    """
    made = _op(x, weights, biases)
    return list(made.split_with_sizes([bias.shape[0] for bias in biases], 1)) if isinstance(made, Tensor) else made


def _select(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], training: bool) -> str:
    _check(x, weights, biases)
    if (
        training
        or not 0 < len(x) <= GROUPED_ROWS
        or torch.compiler.is_compiling()
        or autocast_dtype(x.device) is not None
        or not all(weight.is_contiguous() and bias.is_contiguous() for weight, bias in zip(weights, biases, strict=True))
    ):
        return "torch"
    return select_backend(x, "grouped_linear", len(x), (len(weights), sum(map(len, biases)), x.shape[1]))


def _with_table(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Any, ...]:
    weights, biases = list(weights), list(biases)
    return x, weights, biases, triton_kernels().address_table(weights, biases) if is_eager() else None


def _torch(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [_torch_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    check_tensor("x", x, "[M, K]")
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [M, K]")
    check_dtype("x", x)
    _check_list("weights", weights, "[N, K]")
    _check_list("biases", biases, "[N]")
    if len(weights) != len(biases) or not weights:
        raise ValueError(f"biases: got {len(biases)} for {len(weights)} weights, expected one for each of at least one")
    any_dtype = autocast_dtype(x.device) is not None
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        shape = weight.shape
        if len(shape) != 2 or shape[1] != x.shape[1] or 0 in shape:
            raise ValueError(f"weights: got shape {tuple(shape)} at {i}, expected [N, {x.shape[1]}] for x {tuple(x.shape)}")
        if bias.shape != shape[:1]:
            raise ValueError(f"biases: got shape {tuple(bias.shape)} at {i}, expected {tuple(shape[:1])} for its weight")
        if weight.dtype == bias.dtype == x.dtype and weight.device == bias.device == x.device:
            continue
        for name, tensor in (("weights", weight), ("biases", bias)):
            if tensor.dtype != x.dtype and not any_dtype:
                raise ValueError(f"{name}: got dtype {tensor.dtype} at {i}, expected {x.dtype}, as x")
            if tensor.device != x.device:
                raise ValueError(f"{name}: got a tensor on {tensor.device} at {i}, expected {x.device}, as x")


def _check_list(name: str, tensors: Sequence[Tensor], shape: str) -> None:
    if not isinstance(tensors, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise wrong_type(name, tensors, f"a list of tensors {shape}")
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_nested:  # asked here, since a call of its own takes longer
            check_tensor(name, tensor, shape)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if needs_gradient(x, weight, bias):
        return torch_linear(x, weight, bias)
    if in_fp32(x):
        rows = max(1, WIDENED_AT_ONCE // weight.shape[1])
        parts = zip(weight.split(rows), bias.split(rows), strict=True)
        return torch.cat([torch_linear(x, *part) for part in parts], dim=1)
    if x.device.type == "cpu" and x.dtype == torch.float32 and computes_now() and 1 < len(x) <= MKL_ROWS:
        return torch.addmm(bias[:, None], weight, x.T).T.contiguous()
    return torch_linear(x, weight, bias)


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], table: Tensor | None = None) -> Tensor:
    return x.new_empty((len(x), sum(len(bias) for bias in biases)))


_triton = TritonOp("grouped_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? table=None) -> Tensor", _fake)
_op = Op(_select, _triton, _with_table, torch=_torch)
