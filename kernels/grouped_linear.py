"""y_i = x @ weight_i.T + bias_i for few rows of x: one launch reads every weight where it is, by a table of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .gemm import multiply
from .launch import ahead, launch
from .linear import linear
from .tiles import GemmTile, gemm_tile

FIELDS = 4  # of a row of the table: addresses of weight and bias, first column of y, number of columns
ALIGNMENT = 16  # bytes of a vector load
FULL_PRECISION = (GemmTile(16, 64, 32, num_warps=4, num_stages=3),)

Layout: TypeAlias = tuple[torch.device, torch.dtype, tuple[int, ...]]  # the integers are those of the table, and K

_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # first weight of a call -> (Layout, table) of the latest one
_captured: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # first weight -> {Layout: table} of those that CUDA graphs read


@triton.jit(do_not_specialize=["M", "N"])  # one binary for every batch and depth
def grouped_linear_kernel(
    x_ptr,
    table_ptr,
    y_ptr,
    M,
    N,
    K,
    tiles,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    row_ptr = table_ptr + tl.program_id(0) // tiles * FIELDS
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    outputs = tl.load(row_ptr + 3).to(tl.int32)
    if tl.program_id(0) % tiles * BLOCK_N < outputs:  # narrower linears have fewer tiles
        weight_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
        bias_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(x_ptr.dtype.element_ty))
        rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
        y = multiply(x_ptr, weight_ptr, rows, columns, 0, K, M, outputs, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
        y += tl.load(bias_ptr + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]  # [BLOCK_M, BLOCK_N]
        offset = rows.to(tl.int64)[:, None] * N + tl.load(row_ptr + 2) + columns[None, :]
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < outputs)[None, :])


def grouped_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], table: Tensor | None = None) -> Tensor:
    """x [M, K] for M up to 16; weights [N_i, K] and biases [N_i], contiguous; their ``address_table``, if it is at hand.

    Returns [M, sum of N_i].
    """
    if table is None:
        table = address_table(weights, biases)
    if table is None:
        return torch.cat([linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=1)
    sizes = [len(bias) for bias in biases]
    M, K = x.shape
    y = torch.empty((M, sum(sizes)), dtype=x.dtype, device=x.device)
    tile = gemm_tile("grouped_linear", M, y.shape[1], K, x.dtype, full_precision=FULL_PRECISION)
    tiles = triton.cdiv(max(sizes), tile.n)
    launch(
        grouped_linear_kernel,
        len(sizes) * tiles,
        x_ptr=x.contiguous(),
        table_ptr=table,
        y_ptr=y,
        M=M,
        N=y.shape[1],
        K=K,
        tiles=tiles,
        FIELDS=FIELDS,
        **tile.options(K),
    )
    return y


def address_table(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor | None:
    """Return [linears, 4] int64: where contiguous weights and biases are, and which columns of y are theirs.

    A table is found by what it holds, so it is never stale. A first weight keeps the latest, and all that CUDA graphs have,
    until it is freed: graphs hold no weights, so none of these can be replayed from then on. None if a weight is not aligned to
    16 bytes, or if a graph is being captured and the call before was not with these tensors.
    """
    first = weights[0]
    if ahead.get() is not None:
        return torch.empty((len(weights), FIELDS), dtype=torch.int64, device=first.device)
    fields: list[int] = []
    column = 0
    for weight, bias in zip(weights, biases, strict=True):
        address, outputs = weight.data_ptr(), weight.shape[0]
        if address % ALIGNMENT:
            return None
        fields += address, bias.data_ptr(), column, outputs
        column += outputs
    layout = first.device, first.dtype, (*fields, first.shape[1])
    latest, table = _tables.get(first, (None, None))
    if latest != layout:
        table = None
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        captured = _captured.get(first, {})
        table = captured.get(layout, table)
        if table is not None:
            _captured[first] = {**captured, layout: table}
    elif table is None:
        table = torch.tensor(fields, dtype=torch.int64).view(-1, FIELDS).to(first.device)
        _tables[first] = layout, table
    return table
