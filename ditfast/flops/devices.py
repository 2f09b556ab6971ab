"""The table of GPUs, from their vendors' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class DeviceSpec(NamedTuple):
    """A row of the table."""

    name: str
    fp32: float  # operations a second: vectors, no tf32
    half: float  # operations a second of bf16 and fp16 products, dense, accumulated in fp32
    bandwidth: float  # bytes a second
    memory: float  # bytes
    arch: str  # what kernels compile for
    multiprocessors: int

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second of products of a dtype."""
        return self.fp32 if dtype == torch.float32 else self.half


DEVICES = {
    spec.name: spec
    for spec in (
        DeviceSpec("A100", 19.5e12, 312e12, 2.039e12, 80e9, "sm_80", 108),  # SXM
        DeviceSpec("RTX 3090", 35.6e12, 71e12, 0.936e12, 24e9, "sm_86", 82),
        DeviceSpec("RTX 4090", 82.6e12, 165.2e12, 1.008e12, 24e9, "sm_89", 128),
        DeviceSpec("H100", 66.9e12, 989.4e12, 3.35e12, 80e9, "sm_90", 132),  # SXM
        DeviceSpec("H200", 66.9e12, 989.4e12, 4.8e12, 141e9, "sm_90", 132),  # SXM
        DeviceSpec("B200", 75e12, 2250e12, 8e12, 192e9, "sm_100", 148),  # HGX
        DeviceSpec("RTX 5090", 104.8e12, 209.5e12, 1.792e12, 32e9, "sm_120", 170),
        DeviceSpec("MI300X", 163.4e12, 1307.4e12, 5.3e12, 192e9, "gfx942", 304),
    )
}


def spec_of(device: torch.device) -> DeviceSpec | None:
    """Return the peaks of a CUDA or ROCm device; None for a CPU, for a device that is not known, and without CUDA."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return spec_named(properties.name, properties.multi_processor_count)


def spec_named(name: str, multiprocessors: int | None = None) -> DeviceSpec | None:
    """Return the peaks by the vendor's name; None for a slice of a device or another board, which has other multiprocessors."""
    words = f" {' '.join(re.split(r'[^A-Za-z0-9]+', name))} "
    spec = next((spec for spec in DEVICES.values() if f" {spec.name} " in words), None)
    if spec is None or multiprocessors not in (None, spec.multiprocessors):
        return None
    return spec
