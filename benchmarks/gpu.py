"""The GPU that a bench times: a few calls of torch and of NVML each; gauges.py and ceilings.py compute with the answers."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ditfast.devices import with_index
from ditfast.sampling.graph import cuda_capture

Replay = Callable[[], None]


class Gpu:
    """A CUDA device, made the current one.

    Each method may raise what its library raises: bytes and seconds come from torch, energy, power and clocks from NVML.
    """

    def __init__(self, device: torch.device):
        self.device = with_index(device)
        torch.cuda.set_device(self.device)  # streams and graphs are made on the current one

    def wait(self) -> None:
        """Wait until all that was launched is done."""
        torch.cuda.synchronize(self.device)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """Capture a CUDA graph; return the tensor that ``run`` returns, and what runs it again into the same tensor."""
        return cuda_capture(run)

    def trace(self, run: Callable[[], object], path: Path) -> None:
        """Write a Chrome trace of one run."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            run()
            self.wait()
        profiler.export_chrome_trace(str(path))

    def l2_bytes(self) -> int:
        return self._properties.L2_cache_size

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        """Return the most that was allocated since ``reset_peak``."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def release_cache(self) -> None:
        """Give back what nothing uses any more, compiled models included, which hold themselves by cycles."""
        gc.collect()
        torch.cuda.empty_cache()

    def energy_mj(self) -> int | None:
        """Return millijoules since the driver was loaded; None where the GPU does not count them."""
        nvml, handle = self._nvml
        try:
            return nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError_NotSupported:  # before Volta, and in some virtual machines
            return None

    def power_mw(self) -> int:
        nvml, handle = self._nvml
        return nvml.nvmlDeviceGetPowerUsage(handle)

    def clock_mhz(self) -> int:
        """Return the clock of the multiprocessors, now."""
        nvml, handle = self._nvml
        return nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)

    def slowdowns(self) -> int:
        """Return NVML's bits for what holds the clocks down, now."""
        nvml, handle = self._nvml
        return nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)

    def driver(self) -> str:
        nvml, _ = self._nvml
        return nvml.nvmlSystemGetDriverVersion()

    @property
    def _properties(self) -> Any:
        return torch.cuda.get_device_properties(self.device)

    @functools.cached_property
    def _nvml(self) -> tuple[Any, Any]:
        """The module and this GPU's handle. Its numbers are those of the machine, whatever CUDA_VISIBLE_DEVICES says."""
        import pynvml

        pynvml.nvmlInit()
        uuid = str(self._properties.uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def open_gpu(device: torch.device) -> Gpu | None:
    """Return None for a CPU."""
    return Gpu(device) if device.type == "cuda" else None
