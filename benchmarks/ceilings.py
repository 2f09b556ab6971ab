"""Measured peaks of this very GPU: a copy's bandwidth, and products of large matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ditfast import timer
from ditfast.flops import DeviceSpec

from .gpu import Gpu

LARGEST_COPY = 2**30  # bytes: far more than any cache holds
LARGEST_SIDE = 8192  # of square matrices
SMALLEST_SIDE = 64
ROUNDS = 10
MATRICES = 3


def measure_ceilings(
    gpu: Gpu, like: DeviceSpec, *, largest_copy: int = LARGEST_COPY, largest_side: int = LARGEST_SIDE
) -> DeviceSpec:
    """Return a data sheet with measured peaks, the best of some rounds each, in as much of the memory as is free."""
    return like._replace(
        name="measured",
        fp32=_product_speed(gpu, torch.float32, largest_side),
        half=_product_speed(gpu, torch.bfloat16, largest_side),
        bandwidth=_copy_speed(gpu, largest_copy),
    )


def _copy_speed(gpu: Gpu, size: int) -> float:
    """Bytes a second, read and written."""
    size = min(size, gpu.free_bytes() // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=gpu.device)
    target = torch.empty_like(source)
    return 2 * size / _best(gpu, lambda: target.copy_(source))


def _product_speed(gpu: Gpu, dtype: torch.dtype, side: int) -> float:
    """Operations a second."""
    while side > SMALLEST_SIDE and MATRICES * side**2 * dtype.itemsize > gpu.free_bytes() // 2:
        side //= 2
    a, b = (torch.randn(side, side, device=gpu.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(gpu, lambda: torch.mm(a, b, out=out))


def _best(gpu: Gpu, run: Callable[[], object]) -> float:
    """Seconds."""
    timer.seconds(run, gpu.device)
    return min(timer.seconds(run, gpu.device) for _ in range(ROUNDS))
