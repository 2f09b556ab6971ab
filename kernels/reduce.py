"""Sums of partial sums in a fixed order: the second half of every reduction over rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 256


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
    BLOCK: tl.constexpr,
):
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start = group * partials * width
    _sum(first_ptr + start, first_sum_ptr + group * width, partials, width, column)
    if second_ptr is not None:
        _sum(second_ptr + start, second_sum_ptr + group * width, partials, width, column)
    if third_ptr is not None:
        _sum(third_ptr + start, third_sum_ptr + group * width, partials, width, column)


@triton.jit
def _sum(partial_ptr, sum_ptr, partials, width, column):
    total = tl.zeros(column.shape, tl.float32)
    for _ in range(partials):
        total += tl.load(partial_ptr + column, mask=column < width, other=0.0)
        partial_ptr += width
    tl.store(sum_ptr + column, total.to(sum_ptr.dtype.element_ty), mask=column < width)


def sum_partials(tensors: Sequence[Tensor], groups: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Sums up to three contiguous fp32 tensors [groups * P, width] over P; returns [groups, width] each, in its dtype."""
    if not tensors:
        return []
    width = tensors[0].shape[1]
    sums = [torch.empty(groups, width, dtype=dtype, device=tensors[0].device) for dtype in dtypes]
    missing = [None] * (3 - len(tensors))
    blocks = triton.cdiv(width, BLOCK)
    launch(
        sum_partials_kernel,
        groups * blocks,
        *tensors,
        *missing,
        *sums,
        *missing,
        len(tensors[0]) // max(groups, 1),
        width,
        blocks,
        BLOCK=BLOCK,
        num_warps=2,
    )
    return sums
