"""Seconds that one kernel takes: as long as the slowest of its memory, its products and its instructions."""

from __future__ import annotations

import math

import torch

from ..flops import DeviceSpec
from . import counts
from .assumptions import (
    ATTENTION_BACKWARD,
    FULL_PRECISION,
    FULL_PRECISION_ATTENTION,
    ISSUE,
    KERNEL_US,
    LIBRARY_ATTENTION,
    LIBRARY_ATTENTION_TILE,
    LIBRARY_HEADS,
    LIBRARY_PRODUCT,
    LIBRARY_TILES,
    STEP_US,
    STREAM,
    TRITON_ATTENTION,
    TRITON_PRODUCT,
)
from .counts import Count

KERNEL = 1e-6 * KERNEL_US
STEP = 1e-6 * STEP_US
SPLITS = (1, 2, 4)  # of K, by the library
FP32 = 4  # bytes
FORWARD_DOTS, FORWARD = 2, "attention"
BACKWARD_DOTS = {"query_gradient": 3, "key_value_gradient": 4}
LIBRARY_BACKWARD = 2.5  # times the products of its forward: the scores are computed again


def streamed(moved: float, device: DeviceSpec, share: float = 1.0) -> float:
    """A pass over memory that moves so many bytes."""
    return _memory(moved, device, share) + KERNEL


def triton_rows(
    kernel: str, kind: str, rows: int, width: int, moved: float, device: DeviceSpec, *, programs_rows: int | None = None
) -> float | None:
    """A kernel over whole rows; None where it was not counted."""
    count = counts.rows(device.arch, kernel, width, kind)
    if count is None:
        return None
    rows_a_program = programs_rows or count.sizes[0]
    rows_here = _each(rows, rows_a_program * device.multiprocessors) * rows_a_program
    return max(_memory(moved, device), rows_here * count.instructions / _issued(device)) + KERNEL


def triton_product(kernel: str, M: int, N: int, K: int, dtype: torch.dtype, moved: float, device: DeviceSpec) -> float | None:
    """[M, K] times [K, N]; None in fp32, and where it was not counted."""
    count = None if dtype == torch.float32 else counts.product(device.arch, kernel, M, N)
    if count is None:
        return None
    m, n, k = count.sizes
    programs = _each(M, m) * _each(N, n)
    share = TRITON_PRODUCT[device.arch]
    return max(_memory(moved, device), _looped(programs, _each(K, k), m * n * k, share, count, device)) + KERNEL


def library_product(M: int, N: int, K: int, dtype: torch.dtype, moved: float, device: DeviceSpec) -> float:
    """[M, K] times [K, N], by the library's best tile."""
    share = FULL_PRECISION if dtype == torch.float32 else LIBRARY_PRODUCT[device.arch]
    rate = share * _multiply_adds(device, dtype)
    times = []
    for tile, of_that in LIBRARY_TILES.items():
        m, n = map(int, tile.split("x"))
        for height, width in ((m, n), (n, m)):
            for parts in SPLITS:
                partial = 0 if parts == 1 else 2 * parts * M * N * FP32
                programs = _each(M, height) * _each(N, width) * parts
                products = _each(programs, device.multiprocessors) * height * width * K / parts / (rate * of_that)
                times.append(max(_memory(moved + partial, device), products))
    return min(times) + KERNEL


def triton_attention(
    heads: int, T: int, S: int, head_dim: int, dtype: torch.dtype, moved: float, device: DeviceSpec
) -> float | None:
    """Of ``heads`` sequences of T queries and S keys; None in fp32, and where it was not counted."""
    return _triton_attention(FORWARD, FORWARD_DOTS, heads, T, S, head_dim, dtype, moved, device)


def triton_attention_backward(
    heads: int, T: int, S: int, head_dim: int, dtype: torch.dtype, moved: float, device: DeviceSpec
) -> float | None:
    """Its two kernels; each reads and writes about half of what is moved."""
    found = [
        _triton_attention(kernel, dots, heads, T, S, head_dim, dtype, moved / 2, device)
        for kernel, dots in BACKWARD_DOTS.items()
    ]
    times = [seconds for seconds in found if seconds is not None]
    return math.fsum(times) if len(times) == len(found) else None


def _triton_attention(
    kernel: str, dots: int, heads: int, T: int, S: int, head_dim: int, dtype: torch.dtype, moved: float, device: DeviceSpec
) -> float | None:
    found = None if dtype == torch.float32 else counts.attention(device.arch, kernel, head_dim, T)
    if found is None:
        return None
    count, width = found
    m, n = count.sizes
    staying, passing = (S, T) if kernel == "key_value_gradient" else (T, S)
    if kernel == "key_value_gradient":
        m, n = n, m
    share = TRITON_ATTENTION[device.arch] * (1 if kernel == FORWARD else ATTENTION_BACKWARD)
    programs, steps = heads * _each(staying, m), _each(passing, n)
    return max(_memory(moved, device), _looped(programs, steps, dots * m * n * width, share, count, device)) + KERNEL


def library_attention(
    heads: int, T: int, S: int, head_dim: int, dtype: torch.dtype, moved: float, device: DeviceSpec, *, backward: bool = False
) -> float | None:
    """flash-attn's, or SDPA's; None for head dims that they do not take."""
    width = next((head for head in LIBRARY_HEADS if head >= head_dim), None)
    if width is None:
        return None
    m, n = LIBRARY_ATTENTION_TILE
    share = FULL_PRECISION_ATTENTION if dtype == torch.float32 else LIBRARY_ATTENTION[device.arch]
    work = 2 * m * _each(S, n) * n * width
    if backward:
        work, share = int(LIBRARY_BACKWARD * work), share * ATTENTION_BACKWARD
    turns = _each(heads * _each(T, m), device.multiprocessors)
    return max(_memory(moved, device), turns * work / (share * _multiply_adds(device, dtype))) + KERNEL


def _looped(programs: int, steps: int, work: float, share: float, count: Count, device: DeviceSpec) -> float:
    """Programs that loop: those of the busiest multiprocessor together, or in turns one alone, which latency holds up."""
    step = max(work / (share * _multiply_adds(device, torch.bfloat16)), count.instructions / _issued(device))
    outside = count.outside / _issued(device)
    together = _each(programs, device.multiprocessors) * (steps * step + outside)
    alone = _each(programs, device.multiprocessors * count.programs) * (steps * STEP + outside)
    return max(together, alone)


def _memory(moved: float, device: DeviceSpec, share: float = 1.0) -> float:
    return moved / (device.bandwidth * STREAM[device.arch] * share)


def _multiply_adds(device: DeviceSpec, dtype: torch.dtype) -> float:
    """A second and multiprocessor, at peak."""
    return device.peak(dtype) / 2 / device.multiprocessors


def _issued(device: DeviceSpec) -> float:
    return ISSUE * device.issue


def _each(total: int, size: int) -> int:
    return -(-total // size)
