"""y = LayerNorm(x) * (1 + scale) + shift: x read once, y written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rows import (
    empty_stats,
    in_tile,
    load,
    modulate,
    modulation,
    normalise,
    row_offset,
    row_tile,
    store,
    store_stats,
)


@triton.jit
def layer_norm_modulate_kernel(
    x_ptr,
    x_batch_stride,
    x_token_stride,
    shift_ptr,
    shift_batch_stride,
    shift_token_stride,
    scale_ptr,
    scale_batch_stride,
    scale_token_stride,
    y_ptr,
    stats_ptr,
    num_rows,
    num_tokens,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)[None, :]
    mask = in_tile(row, column, num_rows, D, CHUNK)
    x_row = row_offset(row, num_tokens, x_batch_stride, x_token_stride)
    shift_row = row_offset(row, num_tokens, shift_batch_stride, shift_token_stride)
    scale_row = row_offset(row, num_tokens, scale_batch_stride, scale_token_stride)
    y_row = row.to(tl.int64)[:, None] * D
    xs = ()
    for i in tl.static_range(CHUNKS):
        xs = xs + (load(x_ptr, x_row + (i * CHUNK + column), mask),)
    xs, mean, offset, rstd = normalise(xs, eps, x_ptr.dtype.element_ty, D, CHUNK)
    if stats_ptr is not None:
        store_stats(stats_ptr, row, mean, offset, rstd, num_rows)
    for i in tl.static_range(CHUNKS):
        c = i * CHUNK + column
        y = modulate(xs[i], shift_ptr, shift_row + c, scale_ptr, scale_row + c, mask)
        store(y_ptr, y_row + c, y, mask)


def layer_norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, training: bool
) -> tuple[Tensor, Tensor]:
    """x [B, T, D]; shift and scale [B, D] or [B, T, D], or None.

    Returns [B, T, D], contiguous, and the rows' statistics [B, T, 3] in fp32 (of no elements unless training).
    """
    batch, tokens, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = empty_stats(x, training)
    tile = row_tile("layer_norm_modulate", batch * tokens, width, x.dtype)
    launch(
        layer_norm_modulate_kernel,
        tile.grid(batch * tokens),
        x_ptr=x,
        x_batch_stride=x.stride(0),
        x_token_stride=x.stride(1),
        **modulation("shift", shift),
        **modulation("scale", scale),
        y_ptr=y,
        stats_ptr=stats if training else None,
        num_rows=batch * tokens,
        num_tokens=tokens,
        eps=eps,
        **tile.options(width),
    )
    return y, stats
