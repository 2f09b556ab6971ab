"""How fast a run is, as a share of what its device could do, and how much memory it takes."""

from __future__ import annotations

import functools
import sys
import time
from collections import deque
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .. import flops, timer
from ..config import DiTConfig
from ..flops import DEVICES
from ..flops.devices import spec_of
from ..ops.cpu_products import SLOW_DTYPES

BACKWARD = 2  # times a forward's products
WINDOW = 20  # steps
TRIES = 3
SMALLEST, LARGEST = 512, 16384  # sides of the square products that stand for an unknown device's peak
LONG_ENOUGH = 0.01  # seconds of a product beside which its launch does not count


class Speed(NamedTuple):
    images_per_s: float  # over all ranks
    mfu: float  # model FLOPs utilisation: the model's own operations, forward and backward, over what its devices could do
    memory: int  # bytes, the most that this rank took


class Speedometer:
    """Speed of the last steps of ``batch`` images over all ranks, whose devices are alike."""

    def __init__(self, config: DiTConfig, batch: int, ranks: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.device = batch, device
        self._image_flops = (1 + BACKWARD) * flops.flops(config)
        self._peak = ranks * peak_flops(device, dtype)
        self._ends: deque[float] = deque([time.perf_counter()], maxlen=WINDOW + 1)

    def step(self) -> Speed:
        """To be called at the end of each."""
        self._ends.append(time.perf_counter())
        images_per_s = (len(self._ends) - 1) * self.batch / (self._ends[-1] - self._ends[0])
        return Speed(images_per_s, images_per_s * self._image_flops / self._peak, peak_memory(self.device))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of dense products: by a GPU's data sheet, else measured once."""
    known = _data_sheet(device, dtype) if device.type == "cuda" else None
    if known is not None:
        return known
    slow = device.type == "cpu" and dtype in SLOW_DTYPES  # the ops take fp32 products then
    return _measured(device, torch.float32 if slow else dtype)


def _data_sheet(device: torch.device, dtype: torch.dtype) -> float | None:
    """None of a device that is not known; TF32, where it is allowed, is half of 16 bits on all of NVIDIA's."""
    fp32 = dtype == torch.float32
    tf32 = fp32 and torch.get_float32_matmul_precision() != "highest" and not torch.version.hip
    spec = spec_of(device)
    if spec is not None:
        return spec.half / 2 if tf32 else spec.peak(dtype)
    if torch.version.hip or (fp32 and not tf32):
        return None
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    alike = next((spec for spec in DEVICES.values() if spec.arch == arch), None)  # with other multiprocessors
    if alike is None:
        return None
    half = alike.half * properties.multi_processor_count / alike.multiprocessors
    return half / 2 if tf32 else half


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype) -> float:
    side = SMALLEST
    while True:
        a = torch.ones(side, side, dtype=dtype, device=device)
        product = functools.partial(F.linear, a, a)
        timer.seconds(product, device)  # warm-up
        seconds = min(timer.seconds(product, device) for _ in range(TRIES))
        if seconds >= LONG_ENOUGH or side == LARGEST:
            return 2 * side**3 / seconds
        side *= 2


def peak_memory(device: torch.device) -> int:
    """Bytes: what tensors took on a GPU at most, or this process on a CPU (0 where it cannot be told: Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
