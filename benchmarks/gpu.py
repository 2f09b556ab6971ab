"""The GPU that a bench times, behind one face: tests put a stand-in behind it where there is none.

``Cuda`` only passes on to torch and to NVML, a call or two each. What is computed from the answers is in gauges.py and
ceilings.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ditfast.devices import with_index
from ditfast.sampling.graph import cuda_capture

Replay = Callable[[], None]


class Gpu(Protocol):
    """Each method may raise what its library raises: bytes and seconds come from torch, energy, power and clocks from NVML."""

    device: torch.device

    def wait(self) -> None:
        """Until all that was launched is done."""

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Of ``repeats`` runs, one behind the other."""

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """``run`` as a CUDA graph: the tensor that it returns, and what runs it again into the same tensor."""

    def trace(self, run: Callable[[], object], path: Path) -> None:
        """A Chrome trace of one run."""

    def l2_bytes(self) -> int: ...

    def free_bytes(self) -> int: ...

    def allocated_bytes(self) -> int: ...

    def peak_bytes(self) -> int:
        """The most that was allocated since ``reset_peak``."""

    def reset_peak(self) -> None: ...

    def release_cache(self) -> None: ...

    def energy_mj(self) -> int | None:
        """Since the driver was loaded; None where the GPU does not count it."""

    def power_mw(self) -> int: ...

    def clock_mhz(self) -> int:
        """Of the multiprocessors, now."""

    def slowdowns(self) -> int:
        """NVML's bits for what holds the clocks down, now."""

    def driver(self) -> str: ...


def open_gpu(device: torch.device) -> Gpu | None:
    """None for a CPU."""
    return Cuda(device) if device.type == "cuda" else None


class Cuda:
    def __init__(self, device: torch.device):
        self.device = with_index(device)
        torch.cuda.set_device(self.device)  # streams and graphs are made on the current one

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        return cuda_capture(run)

    def trace(self, run: Callable[[], object], path: Path) -> None:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize(self.device)
        profiler.export_chrome_trace(str(path))

    def l2_bytes(self) -> int:
        return self._properties.L2_cache_size

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def release_cache(self) -> None:
        torch.cuda.empty_cache()

    def energy_mj(self) -> int | None:
        nvml, handle = self._nvml
        try:
            return nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError_NotSupported:  # before Volta, and in some virtual machines
            return None

    def power_mw(self) -> int:
        nvml, handle = self._nvml
        return nvml.nvmlDeviceGetPowerUsage(handle)

    def clock_mhz(self) -> int:
        nvml, handle = self._nvml
        return nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)

    def slowdowns(self) -> int:
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
