"""How fast a run is, as a share of what its device could do, and how much memory it takes."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .. import flops
from ..config import DiTConfig
from ..ops.cpu_products import SLOW_DTYPES
from ..ops.dispatch import has_triton

BACKWARD = 2  # times a forward's products
WINDOW = 20  # steps
_SIZE, _TRIES = 512, 3  # of the product that stands for an unknown device's peak


class Speed(NamedTuple):
    images_per_s: float  # over all ranks
    mfu: float  # model FLOPs utilisation: the model's own operations, forward and backward, over what its devices could do
    memory: int  # bytes, the most that this rank took


class Speedometer:
    """Of the last steps.

    Args:
        config: of the model.
        batch: images in a step, over all ranks.
        ranks: how many.
        device: of this rank; all have alike ones.
        dtype: of the products.
    """

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
    """Floating-point operations a second: of CUDA's dense 16-bit products by its data sheet, else of a large product here."""
    if device.type == "cuda" and dtype != torch.float32 and not torch.version.hip and has_triton():
        properties = torch.cuda.get_device_properties(device)
        from ditfast.kernels.hardware import DEVICES

        known = DEVICES.get(f"sm_{properties.major}{properties.minor}")
        if known is not None:
            return 2 * properties.multi_processor_count * known.multiply_adds * known.clock * 1e9
    slow = device.type == "cpu" and dtype in SLOW_DTYPES  # the ops take fp32 products then
    a = torch.ones(_SIZE, _SIZE, dtype=torch.float32 if slow else dtype, device=device)
    return max(2 * _SIZE**3 / _seconds_of_product(a) for _ in range(_TRIES))


def peak_memory(device: torch.device) -> int:
    """Bytes: what tensors took on a GPU at most, or this process on a CPU (0 where it cannot be told: Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _seconds_of_product(a: torch.Tensor) -> float:
    start = time.perf_counter()
    F.linear(a, a)[0, 0].item()
    return time.perf_counter() - start
