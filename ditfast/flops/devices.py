"""Peaks of devices, from their vendors' data sheets."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DeviceSpec(NamedTuple):
    name: str
    fp32: float  # operations a second: vectors, no tf32
    half: float  # operations a second of bf16 and fp16 products, dense, accumulated in fp32
    bandwidth: float  # bytes a second
    memory: float  # bytes
    arch: str  # what kernels compile for
    multiprocessors: int
    issue: float  # warp instructions a second and multiprocessor

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second of products of a dtype."""
        return self.fp32 if dtype == torch.float32 else self.half


# Four schedulers issue an instruction each cycle. AMD's take four cycles for one of 64 threads. At boost clocks.
DEVICES = {
    spec.name: spec
    for spec in (
        DeviceSpec("A100", 19.5e12, 312e12, 2.039e12, 80e9, "sm_80", 108, 4 * 1.41e9),  # SXM
        DeviceSpec("H100", 66.9e12, 989.4e12, 3.35e12, 80e9, "sm_90", 132, 4 * 1.755e9),  # SXM
        DeviceSpec("H200", 66.9e12, 989.4e12, 4.8e12, 141e9, "sm_90", 132, 4 * 1.755e9),  # SXM
        DeviceSpec("B200", 75e12, 2250e12, 8e12, 192e9, "sm_100", 148, 4 * 1.85e9),  # HGX
        DeviceSpec("MI300X", 163.4e12, 1307.4e12, 5.3e12, 192e9, "gfx942", 304, 2.1e9),
    )
}
