"""What torch._C of a CUDA build has: functions, and the classes below torch.cuda.Stream and Event."""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace
from typing import Any

import torch

from .build import native
from .graphs import GraphBase, new_pool
from .parameters import AMD_ARCHITECTURE, ARCHITECTURES, Parameters, Properties, properties

CUDA = 1  # the number of the device type
LIBRARY_VERSION = 13000


# ------------------------------------------------------------------ streams and events
class StreamBase(torch.Stream):
    """``torch._C._CudaStreamBase``: a stream of the current device, or the one that the numbers name."""

    def __new__(
        cls, priority: int = 0, stream_id: int = 0, device_index: int = 0, device_type: int = 0, stream_ptr: int = 0
    ) -> Any:
        if stream_id or device_index or device_type:
            return super().__new__(cls, stream_id=stream_id, device_index=device_index, device_type=device_type)
        if stream_ptr:
            return super().__new__(cls, stream_id=stream_ptr, device_index=native().exchange_device(-1), device_type=CUDA)
        return super().__new__(cls, device=torch.device("cuda", torch.cuda.current_device()), priority=priority)

    @property
    def cuda_stream(self) -> int:
        """The handle; 0 for the default stream."""
        return self.stream_id

    @property
    def priority(self) -> int:
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5


class EventBase(torch.Event):
    """``torch._C._CudaEventBase``."""

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> Any:
        native().check_usable()
        return super().__new__(cls, device="cuda", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)

    @property
    def cuda_event(self) -> int:
        return self.event_id

    def elapsed_time(self, end_event: torch.Event) -> float:
        """Return milliseconds; ``torch.Event``'s own takes no subclass."""
        return native().elapsed_time(self.event_id, end_event.event_id)


# ------------------------------------------------------------------ functions
class Machine:
    """The GPUs of the fake that is installed; functions of torch._C ask it, so that they can stay the same objects."""

    def __init__(self) -> None:
        self.parameters = Parameters(count=0)
        self.pid = 0

    def set(self, parameters: Parameters) -> None:
        self.parameters, self.pid = parameters, os.getpid()


machine = Machine()


def _init() -> None:
    count = len(machine.parameters.visible)
    if count == 0:
        raise RuntimeError(
            "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
            "http://www.nvidia.com/Download/index.aspx"
        )
    native().initialize()
    torch.cuda.default_generators = tuple(native().default_generator(i) for i in range(count))


def _exchange_device(device: int) -> int:
    return native().exchange_device(device)


def _maybe_exchange_device(device: int) -> int:
    return native().exchange_device(device)


def _set_device(device: int) -> None:
    native().exchange_device(device)


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    native().exchange_device(device_index)
    native().exchange_stream(device_index, stream_id)


def _memory_stats(device: int) -> dict[str, Any]:
    allocated, peak, allocations, frees, live = native().memory(device)

    def figures(current: int, most: int, came: int, went: int) -> dict[str, dict[str, int]]:
        kind = {"current": current, "peak": most, "allocated": came, "freed": went}
        return {"all": kind, "small_pool": dict.fromkeys(kind, 0), "large_pool": kind}

    names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
    return {
        **dict.fromkeys(names, figures(allocated, peak, peak, peak - allocated)),
        **dict.fromkeys(("allocation", "segment", "active"), figures(live, live, allocations, frees)),
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


@functools.cache
def functions() -> dict[str, Any]:
    """Return the attributes of torch._C that a build for CUDA has."""
    fake = native()
    return {
        "_cuda_getDeviceCount": lambda: len(machine.parameters.visible),
        "_cuda_init": _init,
        "_cuda_isInBadFork": lambda: os.getpid() != machine.pid and torch.cuda._initialized,
        "_cuda_getDevice": lambda: fake.exchange_device(-1),
        "_cuda_setDevice": _set_device,
        "_cuda_exchangeDevice": _exchange_device,
        "_cuda_maybeExchangeDevice": _maybe_exchange_device,
        "_cuda_hasPrimaryContext": lambda device: torch.cuda._initialized,
        "_cuda_canDeviceAccessPeer": lambda device, peer: True,
        "_cuda_getArchFlags": lambda: AMD_ARCHITECTURE if machine.parameters.hip else ARCHITECTURES,
        "_cuda_getCompiledVersion": lambda: LIBRARY_VERSION,
        "_cuda_getCurrentStream": lambda device: (fake.exchange_stream(device, -1), device, CUDA),
        "_cuda_getCurrentRawStream": lambda device: fake.exchange_stream(device, -1),
        "_cuda_getDefaultStream": lambda device: (0, device, CUDA),
        "_cuda_getStreamFromExternal": lambda pointer, device: (pointer, device, CUDA),
        "_cuda_setStream": _set_stream,
        "_cuda_synchronize": fake.check_waiting,
        "_cuda_sleep": lambda cycles: fake.check_usable(),
        "_cuda_ipc_collect": fake.check_usable,
        "_cuda_set_sync_debug_mode": fake.set_sync_mode,
        "_cuda_get_sync_debug_mode": fake.sync_mode,
        "_cuda_isCurrentStreamCapturing": fake.is_capturing,
        "_cuda_clearCublasWorkspaces": lambda: None,
        "_cuda_getCurrentBlasHandle": lambda: 0,
        "_cuda_memoryStats": _memory_stats,
        "_cuda_resetPeakMemoryStats": fake.reset_peak,
        "_cuda_resetAccumulatedMemoryStats": fake.reset_peak,
        "_cuda_emptyCache": fake.check_usable,
        "_cuda_setMemoryFraction": lambda fraction, device: None,
        "_cuda_getMemoryFraction": lambda device: 1.0,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_host_emptyCache": lambda: None,
        "_graph_pool_handle": new_pool,
        "_cuda_CUDAAllocator_AllocatorState": type("AllocatorState", (), {}),  # torch._inductor imports it
        "_CudaStreamBase": StreamBase,
        "_CudaEventBase": EventBase,
        "_CudaDeviceProperties": Properties,
        "_CUDAGraph": GraphBase,
        "_has_cuda": True,
    }


def runtime() -> SimpleNamespace:
    """Return ``torch.cuda._cudart``."""

    def mem_get_info(device: int) -> tuple[int, int]:
        total = machine.parameters.memory
        return total - native().memory(device)[0], total

    return SimpleNamespace(
        cudaMemGetInfo=mem_get_info,
        cudaDeviceSynchronize=native().check_waiting,
        cudaError=SimpleNamespace(success=0),
        cudaGetErrorString=lambda code: f"CUDA error {code}",
        cudaProfilerStart=lambda: 0,
        cudaProfilerStop=lambda: 0,
    )


def device_properties(device: int) -> Properties:
    """Do what ``torch.cuda._get_device_properties`` does, which torch._C._cuda_init defines."""
    return properties(machine.parameters, device)
