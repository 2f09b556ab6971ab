"""x + gate * h: the end of a sublayer on its own. x and h read once, the sum written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rows import in_tile, load, modulation, row_offset, row_tile, store


@triton.jit
def add_gated(x, h, gate_ptr, gate_offset, mask):
    if gate_ptr is not None:
        h = h * load(gate_ptr, gate_offset, mask)
    return x + h


@triton.jit
def gated_residual_kernel(
    x_ptr,
    x_batch_stride,
    x_token_stride,
    h_ptr,
    h_batch_stride,
    h_token_stride,
    gate_ptr,
    gate_batch_stride,
    gate_token_stride,
    sum_ptr,
    num_rows,
    num_tokens,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)[None, :]
    mask = in_tile(row, column, num_rows, D, CHUNK)
    x_row = row_offset(row, num_tokens, x_batch_stride, x_token_stride)
    h_row = row_offset(row, num_tokens, h_batch_stride, h_token_stride)
    gate_row = row_offset(row, num_tokens, gate_batch_stride, gate_token_stride)
    sum_row = row.to(tl.int64)[:, None] * D
    for i in tl.static_range(CHUNKS):
        c = i * CHUNK + column
        total = add_gated(load(x_ptr, x_row + c, mask), load(h_ptr, h_row + c, mask), gate_ptr, gate_row + c, mask)
        store(sum_ptr, sum_row + c, total, mask)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """x and h [B, T, D]; gate [B, D] or [B, T, D], or None for a plain residual. Returns [B, T, D], contiguous."""
    batch, tokens, width = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = row_tile("gated_residual", batch * tokens, width, x.dtype)
    launch(
        gated_residual_kernel,
        tile.grid(batch * tokens),
        x_ptr=x,
        x_batch_stride=x.stride(0),
        x_token_stride=x.stride(1),
        h_ptr=h,
        h_batch_stride=h.stride(0),
        h_token_stride=h.stride(1),
        **modulation("gate", gate),
        sum_ptr=total,
        num_rows=batch * tokens,
        num_tokens=tokens,
        **tile.options(width),
    )
    return total
