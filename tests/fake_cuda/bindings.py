"""What torch._C of a CUDA build has: functions, and the classes below torch.cuda.Stream, Event and CUDAGraph."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from .build import native
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


# ------------------------------------------------------------------ graphs
_numbers = itertools.count()
_python_work: dict[int, tuple[int, Callable[[], None]]] = {}  # number -> its graph, what to run
_capturing: list[int] = []


def record(run: Callable[[], None]) -> None:
    """Add something that Python launched to the graph that is being captured."""
    number = next(_numbers)
    _python_work[number] = _capturing[-1], run
    native().record_python(number)


def _drop(graph: int) -> None:
    native().drop_graph(graph)
    for number in [number for number, (owner, _) in _python_work.items() if owner == graph]:
        del _python_work[number]


class GraphBase:
    """``torch._C._CUDAGraph``: what runs between begin and end of a capture, run again by ``replay``."""

    def __new__(cls, keep_graph: bool = False) -> Any:
        graph = super().__new__(cls)
        graph.number_ = next(_numbers)
        graph.captured_ = False
        weakref.finalize(graph, _drop, graph.number_)
        graph.pool_ = (0, graph.number_)
        return graph

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(
                f"Unknown capture error mode. Expected `global`, `thread_local`, or `relaxed`, got {capture_error_mode}"
            )
        if self.captured_:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, create a new instance."
            )
        native().begin_capture(self.number_)
        self.pool_ = pool or self.pool_
        _capturing.append(self.number_)

    def capture_end_pre(self) -> None:
        _capturing.pop()
        native().end_capture()
        self.captured_ = True

    def capture_end_post(self) -> None:
        pass

    def capture_end(self) -> None:
        """End the capture; torch 2.14 calls the two halves itself."""
        self.capture_end_pre()

    @property
    def _has_graph_exec(self) -> bool:
        return self.captured_

    def instantiate(self) -> None:
        self._check()

    def replay(self) -> None:
        self._check()
        done, count = 0, native().work_count(self.number_)
        while done < count:
            done, number = native().replay(self.number_, done)
            if number >= 0:
                _python_work[number][1]()
                done += 1

    def _check(self) -> None:
        if not self.captured_:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")

    def reset(self) -> None:
        self.captured_ = False
        _drop(self.number_)

    def pool(self) -> tuple[int, int]:
        return self.pool_

    def pools(self) -> list[tuple[int, int]]:
        return [self.pool_]

    def register_generator_state(self, generator: torch.Generator) -> None:
        """Generators of the fake draw on at every replay anyway."""

    def enable_debug_mode(self) -> None:
        pass

    def debug_dump(self, path: str) -> None:
        pass


# ------------------------------------------------------------------ functions
def functions(parameters: Parameters) -> dict[str, Any]:
    """Return the attributes of torch._C that a build with these GPUs has."""
    fake = native()
    pid = os.getpid()

    def init() -> None:
        if parameters.count == 0:
            raise RuntimeError(
                "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
                "http://www.nvidia.com/Download/index.aspx"
            )
        torch.cuda.default_generators = tuple(fake.default_generator(i) for i in range(parameters.count))

    def set_device(device: int) -> None:
        fake.exchange_device(device)

    def current_device() -> int:
        return fake.exchange_device(-1)

    def current_stream(device: int) -> tuple[int, int, int]:
        return fake.exchange_stream(device, -1), device, CUDA

    def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
        if device_index != fake.exchange_device(-1):
            fake.exchange_device(device_index)
        fake.exchange_stream(device_index, stream_id)

    return {
        "_cuda_getDeviceCount": lambda: parameters.count,
        "_cuda_init": init,
        "_cuda_isInBadFork": lambda: os.getpid() != pid and torch.cuda._initialized,
        "_cuda_getDevice": current_device,
        "_cuda_setDevice": set_device,
        "_cuda_exchangeDevice": fake.exchange_device,
        "_cuda_maybeExchangeDevice": fake.exchange_device,
        "_cuda_hasPrimaryContext": lambda device: torch.cuda._initialized,
        "_cuda_canDeviceAccessPeer": lambda device, peer: True,
        "_cuda_getArchFlags": lambda: AMD_ARCHITECTURE if parameters.hip else ARCHITECTURES,
        "_cuda_getCompiledVersion": lambda: LIBRARY_VERSION,
        "_cuda_getCurrentStream": current_stream,
        "_cuda_getCurrentRawStream": lambda device: fake.exchange_stream(device, -1),
        "_cuda_getDefaultStream": lambda device: (0, device, CUDA),
        "_cuda_getStreamFromExternal": lambda pointer, device: (pointer, device, CUDA),
        "_cuda_setStream": set_stream,
        "_cuda_synchronize": fake.check_waiting,
        "_cuda_sleep": lambda cycles: fake.check_usable(),
        "_cuda_ipc_collect": fake.check_usable,
        "_cuda_set_sync_debug_mode": fake.set_sync_mode,
        "_cuda_get_sync_debug_mode": fake.sync_mode,
        "_cuda_isCurrentStreamCapturing": fake.is_capturing,
        "_cuda_clearCublasWorkspaces": lambda: None,
        "_cuda_getCurrentBlasHandle": lambda: 0,
        **_memory_functions(),
        "_host_emptyCache": lambda: None,
        "_graph_pool_handle": lambda: (0, next(_numbers)),
        "_CudaStreamBase": StreamBase,
        "_CudaEventBase": EventBase,
        "_CudaDeviceProperties": Properties,
        "_CUDAGraph": GraphBase,
        "_has_cuda": True,
    }


def _memory_functions() -> dict[str, Any]:
    fake = native()

    def stats(device: int) -> dict[str, Any]:
        allocated, peak, allocations, frees, live = fake.memory(device)

        def figures(current: int, most: int, came: int, went: int) -> dict[str, dict[str, int]]:
            kind = {"current": current, "peak": most, "allocated": came, "freed": went}
            return {"all": kind, "small_pool": dict.fromkeys(kind, 0), "large_pool": kind}

        size = figures(allocated, peak, peak, peak - allocated)
        names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
        number = figures(live, live, allocations, frees)
        return {
            **dict.fromkeys(names, size),
            **dict.fromkeys(("allocation", "segment", "active"), number),
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    return {
        "_cuda_memoryStats": stats,
        "_cuda_resetPeakMemoryStats": fake.reset_peak,
        "_cuda_resetAccumulatedMemoryStats": fake.reset_peak,
        "_cuda_emptyCache": fake.check_usable,
        "_cuda_setMemoryFraction": lambda fraction, device: None,
        "_cuda_getMemoryFraction": lambda device: 1.0,
        "_cuda_getAllocatorBackend": lambda: "native",
    }


def runtime(parameters: Parameters) -> SimpleNamespace:
    """Return ``torch.cuda._cudart``."""

    def mem_get_info(device: int) -> tuple[int, int]:
        return parameters.memory - native().memory(device)[0], parameters.memory

    return SimpleNamespace(
        cudaMemGetInfo=mem_get_info,
        cudaDeviceSynchronize=native().check_waiting,
        cudaError=SimpleNamespace(success=0),
        cudaGetErrorString=lambda code: f"CUDA error {code}",
        cudaProfilerStart=lambda: 0,
        cudaProfilerStop=lambda: 0,
    )


def device_properties(parameters: Parameters) -> Callable[[int], Properties]:
    """Return ``torch.cuda._get_device_properties``, which torch._C._cuda_init defines."""
    made = [properties(parameters, i) for i in range(parameters.count)]
    return lambda device: made[device]
