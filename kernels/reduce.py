"""Sums of partial sums in a fixed order: the second half of every reduction over rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 128
ROWS = 16  # summed side by side: shorter chains of roundings, and of waiting for memory


@triton.jit
def sum_partials_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    first_sum_ptr,
    second_sum_ptr,
    third_sum_ptr,
    partials,
    width,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start = group * partials * width
    _sum(first_ptr + start, first_sum_ptr + group * width, partials, width, column, ROWS)
    if second_ptr is not None:
        _sum(second_ptr + start, second_sum_ptr + group * width, partials, width, column, ROWS)
    if third_ptr is not None:
        _sum(third_ptr + start, third_sum_ptr + group * width, partials, width, column, ROWS)


@triton.jit
def _sum(partial_ptr, sum_ptr, partials, width, column, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    pointers = partial_ptr + row.to(tl.int64) * width + column[None, :]
    total = tl.zeros([ROWS, column.shape[0]], tl.float32)
    for start in range(0, partials, ROWS):
        total += tl.load(pointers, mask=(row < partials - start) & (column < width)[None, :], other=0.0)
        pointers += ROWS * width
    tl.store(sum_ptr + column, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=column < width)


def sum_partials(tensors: Sequence[Tensor], groups: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Sums up to three contiguous fp32 tensors [groups * P, width] over P; returns [groups, width] each, in its dtype."""
    if not tensors:
        return []
    width = tensors[0].shape[1]
    sums = [torch.empty(groups, width, dtype=dtype, device=tensors[0].device) for dtype in dtypes]
    blocks = triton.cdiv(width, BLOCK)
    launch(
        sum_partials_kernel,
        groups * blocks,
        **dict(zip(("first_ptr", "second_ptr", "third_ptr"), [*tensors, None, None], strict=False)),
        **dict(zip(("first_sum_ptr", "second_sum_ptr", "third_sum_ptr"), [*sums, None, None], strict=False)),
        partials=len(tensors[0]) // max(groups, 1),
        width=width,
        blocks=blocks,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return sums
