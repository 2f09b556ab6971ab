"""The backward of the row ops: of the joint x_new = x + gate * h, u = LayerNorm(x_new) * (1 + scale) + shift, or of a part.

The rows of a sample go through a program one by one, while the gradients of the sample's vectors add up in fp32 registers.
What each program found is summed by a second kernel in a fixed order: no atomics, so the bits are the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, launch
from .reduce import sum_partials
from .rows import modulation


class RowLoop(NamedTuple):
    """How a program covers a row of width D: two powers of two that fill it, or one that masks the rest."""

    first: int
    second: int
    num_warps: int


def row_loop(width: int, accumulators: int = 3) -> RowLoop:
    """1152 = 1024 + 128, 768 = 512 + 256, 384 = 256 + 128; one block of 2048 would leave 44% of its lanes idle at 1152.

    Two warps sum a row in fewer instructions than four; three accumulators take more registers than two warps have.
    """
    first = 1 << (width.bit_length() - 1)
    second = width - first
    if second and (second < 32 or second & (second - 1)):
        first, second = 2 * first, 0
    if interpreted():
        return RowLoop(first, second, num_warps=1)
    two = 512 if accumulators > 2 else 1280
    return RowLoop(first, second, num_warps=1 if width < 256 else 2 if width < two else 4 if width <= 2048 else 8)


def rows_per_program(num_rows: int, num_tokens: int) -> int:
    """More rows mean fewer partial sums to write, and fewer programs to fill the machine with."""
    wanted = 32 if num_rows >= 16384 else 16 if num_rows >= 4096 else 8 if num_rows >= 1024 else 4
    return min(wanted, triton.next_power_of_2(max(num_tokens, 1)))


@triton.jit
def joint_backward_kernel(
    du_ptr,
    dx_new_ptr,
    x_ptr,
    x_batch_stride,
    x_token_stride,
    stats_ptr,
    h_ptr,
    h_batch_stride,
    h_token_stride,
    gate_ptr,
    gate_batch_stride,
    gate_token_stride,
    scale_ptr,
    scale_batch_stride,
    scale_token_stride,
    dx_ptr,
    dh_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    num_tokens,
    programs_per_sample,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    SHIFT_PER_TOKEN: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // programs_per_sample).to(tl.int64)
    first_token = program % programs_per_sample * ROWS
    gate = _row(gate_ptr, sample * gate_batch_stride, D, D, FIRST, SECOND, True)
    scale = _row(scale_ptr, sample * scale_batch_stride, D, D, FIRST, SECOND, True)
    dgate = _zeros(FIRST, SECOND)
    dshift = _zeros(FIRST, SECOND)
    dscale = _zeros(FIRST, SECOND)
    for i in range(ROWS):
        token = (first_token + i).to(tl.int64)
        width = tl.where(token < num_tokens, D, 0)  # of the row, which may be past the last one
        row = sample * num_tokens + token
        dx = _row(dx_new_ptr, row * D, width, D, FIRST, SECOND, EVEN)
        if du_ptr is not None:
            du = _row(du_ptr, row * D, width, D, FIRST, SECOND, EVEN)
            if SHIFT_PER_TOKEN:
                _store_row(dshift_ptr, row * D, du, width, D, FIRST, SECOND, EVEN)
            elif dshift_ptr is not None:
                dshift = _add(dshift, du)
            x = _row(x_ptr, sample * x_batch_stride + token * x_token_stride, width, D, FIRST, SECOND, EVEN)
            stats = stats_ptr + 3 * (sample * num_tokens + tl.minimum(token, num_tokens - 1))
            mean = tl.load(stats)
            rstd = tl.load(stats + 2)
            normalised = _normalised(x, mean, tl.load(stats + 1), rstd)
            if SCALE_PER_TOKEN:
                _store_row(dscale_ptr, row * D, _multiply(du, normalised), width, D, FIRST, SECOND, EVEN)
                offset = sample * scale_batch_stride + token * scale_token_stride
                scale = _row(scale_ptr, offset, width, D, FIRST, SECOND, EVEN)
            elif dscale_ptr is not None:
                dscale = _add(dscale, _multiply(du, normalised))
            if scale_ptr is not None:
                du = _add(du, _multiply(du, scale))
            dx = _add(dx, _norm_backward(du, normalised, rstd, D))
            _store_row(dx_ptr, row * D, dx, width, D, FIRST, SECOND, EVEN)
        if gate_ptr is not None:
            h = _row(h_ptr, sample * h_batch_stride + token * h_token_stride, width, D, FIRST, SECOND, EVEN)
            if GATE_PER_TOKEN:
                _store_row(dgate_ptr, row * D, _multiply(dx, h), width, D, FIRST, SECOND, EVEN)
                offset = sample * gate_batch_stride + token * gate_token_stride
                gate = _row(gate_ptr, offset, width, D, FIRST, SECOND, EVEN)
            else:
                dgate = _add(dgate, _multiply(dx, h))
            _store_row(dh_ptr, row * D, _multiply(gate, dx), width, D, FIRST, SECOND, EVEN)
    partial = program.to(tl.int64) * D
    if dgate_ptr is not None and not GATE_PER_TOKEN:
        _store_row(dgate_ptr, partial, dgate, D, D, FIRST, SECOND, True)
    if dshift_ptr is not None and not SHIFT_PER_TOKEN:
        _store_row(dshift_ptr, partial, dshift, D, D, FIRST, SECOND, True)
    if dscale_ptr is not None and not SCALE_PER_TOKEN:
        _store_row(dscale_ptr, partial, dscale, D, D, FIRST, SECOND, True)


@triton.jit
def _row(pointer, offset, width, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, EVEN: tl.constexpr):
    """A row as a tuple of one or two fp32 blocks; zeros where there is no tensor, and past ``width``."""
    if pointer is None:
        return _zeros(FIRST, SECOND)
    elif SECOND == 0:
        return (_load(pointer + offset, tl.arange(0, FIRST), width, D, FIRST, EVEN),)
    else:
        first = _load(pointer + offset, tl.arange(0, FIRST), width, D, FIRST, EVEN)
        return (first, _load(pointer + offset, FIRST + tl.arange(0, SECOND), width, D, FIRST + SECOND, EVEN))


@triton.jit
def _load(pointer, column, width, D: tl.constexpr, COVERED: tl.constexpr, EVEN: tl.constexpr):
    if COVERED > D:
        return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)
    elif EVEN:
        return tl.load(pointer + column).to(tl.float32)
    else:
        return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _store_row(pointer, offset, row, width, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, EVEN: tl.constexpr):
    column = tl.arange(0, FIRST)
    value = row[0].to(pointer.dtype.element_ty)
    if D < FIRST:
        tl.store(pointer + offset + column, value, mask=column < width)
    elif EVEN:
        tl.store(pointer + offset + column, value)
    else:
        tl.store(pointer + offset + column, value, mask=column < width)
    if SECOND > 0:
        column = FIRST + tl.arange(0, SECOND)
        value = row[1].to(pointer.dtype.element_ty)
        if EVEN:
            tl.store(pointer + offset + column, value)
        else:
            tl.store(pointer + offset + column, value, mask=column < width)


@triton.jit
def _zeros(FIRST: tl.constexpr, SECOND: tl.constexpr):
    if SECOND == 0:
        return (tl.zeros([FIRST], tl.float32),)
    else:
        return (tl.zeros([FIRST], tl.float32), tl.zeros([SECOND], tl.float32))


@triton.jit
def _add(a, b):
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i] + b[i],)
    return total


@triton.jit
def _multiply(a, b):
    product = ()
    for i in tl.static_range(len(a)):
        product = product + (a[i] * b[i],)
    return product


@triton.jit
def _normalised(x, mean, offset, rstd):
    normalised = ()
    for i in tl.static_range(len(x)):
        normalised = normalised + ((x[i] - mean) * rstd - offset,)
    return normalised


@triton.jit
def _norm_backward(dy, normalised, rstd, D: tl.constexpr):
    """Gradient of LayerNorm's input: (dy - mean(dy) - normalised * mean(dy * normalised)) * rstd."""
    total = 0.0
    projection = 0.0
    for i in tl.static_range(len(dy)):
        t, p = tl.reduce((dy[i], dy[i] * normalised[i]), 0, _add_pairs)
        total += t
        projection += p
    dx = ()
    for i in tl.static_range(len(dy)):
        dx = dx + ((dy[i] - total * (1.0 / D) - normalised[i] * (projection * (1.0 / D))) * rstd,)
    return dx


@triton.jit
def _add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


def joint_backward(
    du: Tensor | None,
    dx_new: Tensor | None,
    x: Tensor | None,
    stats: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
) -> list[Tensor]:
    """Gradients through u and x_new [B, T, D]; x is what was normalised, stats [B, T, 3] as rows.store_stats.

    Without du (and then without x, stats, shift, scale) it is the backward of ``gated_residual``, without h and gate that of
    ``layer_norm_modulate``. Returns, of those that the arguments imply: dx [B, T, D] if du is given; dh if h and the gate
    are; dgate, dshift, dscale, each of its vector's shape and dtype.
    """
    like = du if du is not None else dx_new
    assert like is not None
    batch, tokens, width = like.shape
    rows = rows_per_program(batch * tokens, tokens)
    programs_per_sample = triton.cdiv(tokens, rows)
    du, dx_new = (gradient if gradient is None else gradient.contiguous() for gradient in (du, dx_new))
    dx = None if du is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dh = None if h is None else torch.empty(h.shape, dtype=h.dtype, device=h.device)
    vectors = [gate, shift, scale]
    sums = [
        vector
        if vector is None
        else torch.empty_like(vector, memory_format=torch.contiguous_format)
        if vector.dim() == 3
        else torch.empty(batch * programs_per_sample, width, dtype=torch.float32, device=like.device)
        for vector in vectors
    ]
    tile = row_loop(width, sum(vector is not None and vector.dim() == 2 for vector in vectors))
    launch(
        joint_backward_kernel,
        batch * programs_per_sample,
        du_ptr=du,
        dx_new_ptr=dx_new,
        **modulation("x", x),
        stats_ptr=stats,
        **modulation("h", h),
        **modulation("gate", gate),
        **modulation("scale", scale),
        dx_ptr=dx,
        dh_ptr=dh,
        dgate_ptr=sums[0],
        dshift_ptr=sums[1],
        dscale_ptr=sums[2],
        num_tokens=tokens,
        programs_per_sample=programs_per_sample,
        D=width,
        FIRST=tile.first,
        SECOND=tile.second,
        ROWS=rows,
        EVEN=tokens % rows == 0,
        GATE_PER_TOKEN=_per_token(gate),
        SHIFT_PER_TOKEN=_per_token(shift),
        SCALE_PER_TOKEN=_per_token(scale),
        num_warps=tile.num_warps,
    )
    whole = [(v, s) for v, s in zip(vectors, sums, strict=True) if v is not None and s is not None and v.dim() == 2]
    reduced = iter(sum_partials([s for _, s in whole], batch, [v.dtype for v, _ in whole]))
    gradients = [s if v is None or v.dim() == 3 else next(reduced) for v, s in zip(vectors, sums, strict=True)]
    return [gradient for gradient in (dx, dh, *gradients) if gradient is not None]


def _per_token(vector: Tensor | None) -> bool:
    return vector is not None and vector.dim() == 3
