"""The joint between two sublayers in one kernel: x_new = x + gate * h, u = LayerNorm(x_new) * (1 + scale) + shift.

Four passes over [B, T, D], two in and two out, where eager PyTorch makes about ten.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_residual import add_gated
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
def gated_residual_layer_norm_modulate_kernel(
    x_ptr,
    x_batch_stride,
    x_token_stride,
    h_ptr,
    h_batch_stride,
    h_token_stride,
    gate_ptr,
    gate_batch_stride,
    gate_token_stride,
    shift_ptr,
    shift_batch_stride,
    shift_token_stride,
    scale_ptr,
    scale_batch_stride,
    scale_token_stride,
    x_new_ptr,
    u_ptr,
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
    h_row = row_offset(row, num_tokens, h_batch_stride, h_token_stride)
    gate_row = row_offset(row, num_tokens, gate_batch_stride, gate_token_stride)
    shift_row = row_offset(row, num_tokens, shift_batch_stride, shift_token_stride)
    scale_row = row_offset(row, num_tokens, scale_batch_stride, scale_token_stride)
    out_row = row.to(tl.int64)[:, None] * D
    xs = ()
    for i in tl.static_range(CHUNKS):
        c = i * CHUNK + column
        total = add_gated(load(x_ptr, x_row + c, mask), load(h_ptr, h_row + c, mask), gate_ptr, gate_row + c, mask)
        store(x_new_ptr, out_row + c, total, mask)
        # u is the norm of what was stored, which is all that the next sublayer and the backward can see.
        xs = xs + (total.to(x_new_ptr.dtype.element_ty).to(tl.float32),)
    xs, mean, offset, rstd = normalise(xs, eps, x_ptr.dtype.element_ty, D, CHUNK)
    if stats_ptr is not None:
        store_stats(stats_ptr, row, mean, offset, rstd, num_rows)
    for i in tl.static_range(CHUNKS):
        c = i * CHUNK + column
        u = modulate(xs[i], shift_ptr, shift_row + c, scale_ptr, scale_row + c, mask)
        store(u_ptr, out_row + c, u, mask)


def gated_residual_layer_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x and h [B, T, D]; gate, shift and scale [B, D] or [B, T, D], or None.

    Returns x_new and u, [B, T, D], contiguous, and the statistics of x_new's rows as ``layer_norm_modulate`` does.
    """
    batch, tokens, width = x.shape
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    u = torch.empty_like(x_new)
    stats = empty_stats(x, training)
    tile = row_tile("gated_residual_layer_norm_modulate", batch * tokens, width, x.dtype)
    launch(
        gated_residual_layer_norm_modulate_kernel,
        tile.grid(batch * tokens),
        x_ptr=x,
        x_batch_stride=x.stride(0),
        x_token_stride=x.stride(1),
        h_ptr=h,
        h_batch_stride=h.stride(0),
        h_token_stride=h.stride(1),
        **modulation("gate", gate),
        **modulation("shift", shift),
        **modulation("scale", scale),
        x_new_ptr=x_new,
        u_ptr=u,
        stats_ptr=stats if training else None,
        num_rows=batch * tokens,
        num_tokens=tokens,
        eps=eps,
        **tile.options(width),
    )
    return x_new, u, stats
