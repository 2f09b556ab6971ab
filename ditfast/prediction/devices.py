"""Which of the known devices a torch device is."""

from __future__ import annotations

import re

import torch

from ..flops import DEVICES, DeviceSpec


def spec_of(device: torch.device) -> DeviceSpec | None:
    """Peaks of a CUDA or ROCm device; None for a CPU, for a device that is not known, and without CUDA."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(device)
    return spec_named(found.name, found.multi_processor_count)


def spec_named(name: str, multiprocessors: int | None = None) -> DeviceSpec | None:
    """By the vendor's name; a slice of a device, or another board of that name, has other multiprocessors and is not known."""
    spec = next((DEVICES[word] for word in re.split(r"[\s\-_]+", name) if word in DEVICES), None)
    if spec is None or multiprocessors not in (None, spec.multiprocessors):
        return None
    return spec
