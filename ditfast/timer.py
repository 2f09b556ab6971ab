"""Time of calls: the one timer of tuning, training and the benches."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def seconds(call: Call, device: torch.device, repeats: int = 1, meanwhile: Call | None = None) -> float:
    """Return the seconds of ``repeats`` calls, one behind the other, on the device.

    Args:
        call: launches work, or does it, on a CPU.
        device: whose time is taken, on CUDA by events of its current stream.
        repeats: of ``call``.
        meanwhile: called once while a GPU works on what was launched last; its time does not count.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    for _ in range(repeats):
        call()
    end.record(stream)
    if meanwhile is not None:
        meanwhile()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def host_seconds(call: Call, device: torch.device) -> tuple[float, float]:
    """Return the seconds until a call returns, from an idle device on, and until the device is idle again."""
    synchronize(device)
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    synchronize(device)
    return returned - start, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
