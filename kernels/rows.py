"""What the row kernels share: tiles of whole rows, held in registers as a tuple of column chunks.

A [ROWS, 128] chunk has no masked lane at D = 384, 768, 1024 and 1152, and every load is 16 bytes a thread; one block of the
next power of two would idle up to 44% of its lanes. Any other width takes that one block, masked, and one row at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, warp_size
from .tiles import tuned

CHUNK = 128
THREADS = 128  # of eight neighbouring elements each: 16 bytes of 16-bit storage
CHUNKED = ((2, 1), (4, 1), (4, 2), (8, 2), (8, 8), (16, 4), (16, 8))  # rows and warps that measuring may prefer
LARGEST_CHUNKED_WIDTH = 1280  # beyond it eight rows of a tile no longer fit the registers of four warps


class RowTile(NamedTuple):
    """How a program covers rows of width D."""

    rows: int
    chunk: int
    num_warps: int

    def grid(self, num_rows: int) -> int:
        return triton.cdiv(num_rows, self.rows)

    def options(self, width: int) -> dict[str, int]:
        chunks = triton.cdiv(width, self.chunk)
        return {"D": width, "ROWS": self.rows, "CHUNK": self.chunk, "CHUNKS": chunks, "num_warps": self.num_warps}


def row_tile(kernel: str, num_rows: int, width: int, dtype: torch.dtype) -> RowTile:
    chunked = width % CHUNK == 0 and width <= LARGEST_CHUNKED_WIDTH
    chunk = CHUNK if chunked else triton.next_power_of_2(width)
    if interpreted():  # costs per program, not per element
        return RowTile(rows=64, chunk=chunk, num_warps=1)
    if chunked:
        builtin = RowTile(rows=8, chunk=chunk, num_warps=THREADS // warp_size())
        others = [RowTile(rows, chunk, num_warps) for rows, num_warps in CHUNKED]
    else:
        builtin = RowTile(rows=1, chunk=chunk, num_warps=min(16, max(1, chunk // 512)))
        others = [builtin._replace(num_warps=num_warps) for num_warps in (1, 2, 4, 8, 16)]
    return tuned(kernel, dtype, num_rows, (width,), builtin, lambda: others)


def modulation(name: str, vector: Tensor | None) -> dict[str, Tensor | int | None]:
    """Return the kernel's ``<name>_ptr``, ``<name>_batch_stride`` and ``<name>_token_stride`` of a [B, D] or [B, T, D] vector.

    One vector a sample has token stride 0.
    """
    batch_stride = 0 if vector is None else vector.stride(0)
    token_stride = 0 if vector is None or vector.dim() == 2 else vector.stride(1)
    return {f"{name}_ptr": vector, f"{name}_batch_stride": batch_stride, f"{name}_token_stride": token_stride}


def empty_stats(x: Tensor, training: bool) -> Tensor:
    """Allocate what ``store_stats`` keeps of each row of x [B, T, D]; no elements where no backward will ask."""
    return torch.empty((*x.shape[:2], 3) if training else (0,), dtype=torch.float32, device=x.device)


@triton.jit
def row_offset(row, num_tokens, batch_stride, token_stride):
    """Element offset of each row [ROWS, 1] of a [B, T, D] tensor; 64-bit, since tensors may pass 2^31 elements."""
    batch = (row // num_tokens).to(tl.int64)
    token = (row % num_tokens).to(tl.int64)
    return (batch * batch_stride + token * token_stride)[:, None]


@triton.jit
def in_tile(row, column, num_rows, D: tl.constexpr, CHUNK: tl.constexpr):
    """Mask [ROWS, CHUNK] or, where every chunk is full, [ROWS, 1]."""
    if D % CHUNK == 0:
        return (row < num_rows)[:, None]
    else:
        return (row < num_rows)[:, None] & (column < D)


@triton.jit
def load(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, offset, value, mask):
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def normalise(xs, eps, STORED: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """LayerNorm without weight or bias of rows held as a tuple of fp32 chunks, and what ``store_stats`` keeps [ROWS, 1].

    The mean is a sum of two, rounded and what that left: rows without variance show the difference a thousand times
    (eps^-1/2). Lanes past D hold zeros in xs.
    """
    total = sum_of_chunks(xs)
    mean = tl.fma(total, 1.0 / D, 0.0)  # not a product, which the compiler would fuse, unrounded, into each difference
    centred = ()
    for i in tl.static_range(len(xs)):
        x = xs[i] - mean
        if D % CHUNK != 0:
            x = tl.where(tl.arange(0, CHUNK)[None, :] < D, x, 0.0)
        centred = centred + (x,)
    if tl.float32 == STORED:
        rest = sum_of_chunks(centred) * (1.0 / D)
    else:  # the sum of 16-bit values that are nearly alike is exact
        rest = tl.fma(-mean, D * 1.0, total) * (1.0 / D)
    squares = tl.zeros_like(xs[0])
    for i in tl.static_range(len(xs)):
        squares += centred[i] * centred[i]
    rstd = tl.rsqrt(tl.sum(squares, 1)[:, None] * (1.0 / D) - rest * rest + eps)
    offset = rest * rstd
    normalised = ()
    for i in tl.static_range(len(xs)):
        normalised = normalised + (centred[i] * rstd - offset,)
    return normalised, mean, offset, rstd


@triton.jit
def sum_of_chunks(xs):
    """Sum of each row [ROWS, 1]."""
    total = tl.zeros_like(xs[0])
    for i in tl.static_range(len(xs)):
        total += xs[i]
    return tl.sum(total, 1)[:, None]


@triton.jit
def store_stats(stats_ptr, row, mean, offset, rstd, num_rows):
    """Keep what the backward needs of each row: fp32 [rows, 3], of which ``(x - mean) * rstd - offset`` is LayerNorm."""
    mask = (row < num_rows)[:, None]
    stats = stats_ptr + 3 * row.to(tl.int64)[:, None]
    tl.store(stats, mean, mask=mask)
    tl.store(stats + 1, offset, mask=mask)
    tl.store(stats + 2, rstd, mask=mask)


@triton.jit
def modulate(normalised, shift_ptr, shift_offset, scale_ptr, scale_offset, mask):
    if scale_ptr is not None:
        normalised = normalised * (1.0 + load(scale_ptr, scale_offset, mask))
    if shift_ptr is not None:
        normalised = normalised + load(shift_ptr, shift_offset, mask)
    return normalised
