"""Where kernels run: the launch itself, and what stands behind Triton on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver


class Ahead(NamedTuple):
    """Takes launches instead of a device, for kernels.ahead: their kernel, grid and arguments."""

    arch: str
    take: Callable[[Any, int, dict[str, object]], None]


class Launch(NamedTuple):
    """A kernel that was launched."""

    compiled: Any
    grid: int
    arguments: list[object]  # in the order of the kernel's parameters, constants included

    def __call__(self, stream: int) -> None:
        compiled = self.compiled
        compiled.run(self.grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *self.arguments)


ahead: ContextVar[Ahead | None] = ContextVar("ditfast.ahead", default=None)
recorder: ContextVar[Callable[[Callable[[], Launch | None]], None] | None] = ContextVar("ditfast.recorder", default=None)


def launch(kernel: Any, grid: int, **arguments: object) -> None:
    """Launch ``kernel[(grid,)](**arguments)`` on the current device and stream; nothing for an empty grid.

    Arguments are named as the kernel's parameters, beside Triton's options. Inside ``recorder`` the launch is recorded too.
    """
    if grid == 0:
        return
    # Triton 3.9 warns where the choice is left open; products and sums of our kernels are meant to fuse.
    arguments["enable_fp_fusion"] = True
    compiling, record = ahead.get(), recorder.get()
    if compiling is not None:
        compiling.take(kernel, grid, arguments)
    elif record is None:
        kernel[(grid,)](**arguments)
    else:
        record(lambda: _launched(kernel, grid, arguments))


def _launched(kernel: Any, grid: int, arguments: dict[str, object]) -> Launch | None:
    """Launch a kernel through Triton; return the launch, or None under the interpreter, which compiles nothing."""
    compiled = kernel[(grid,)](**arguments)
    if compiled is None:
        return None
    return Launch(compiled, grid, [arguments[parameter.name] for parameter in kernel.params])


def current_stream() -> Callable[[int], int]:
    """Return what returns the handle of a device's current stream."""
    return driver.active.get_current_stream


_knobs = triton.knobs.runtime


def needs_jit() -> bool:
    """Return whether launches must go through Triton: it compiles ahead of time, or a profiler listens to launches."""
    return bool(ahead.get() or _knobs.launch_enter_hook.calls or _knobs.launch_exit_hook.calls)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Tiles are chosen for, and kernels launched on, the current device: inside, that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def interpreted() -> bool:
    """Whether kernels were jitted for Triton's interpreter (TRITON_INTERPRET=1)."""
    return ahead.get() is None and bool(triton.knobs.runtime.interpret)


def target() -> str:
    """What kernels compile for: ``sm_90``, ``gfx942``, or ``interpreter``.

    Raises:
        RuntimeError: there is no GPU, no simulator and no interpreter.
    """
    compiling = ahead.get()
    if compiling is not None:
        return compiling.arch
    if interpreted():
        return "interpreter"
    try:
        current = driver.active.get_current_target()
    except RuntimeError as error:
        raise RuntimeError(f"Triton found nothing to run kernels on ({error})") from error
    return f"sm_{current.arch}" if current.backend == "cuda" else str(current.arch)


def warp_size() -> int:
    """Threads that execute one instruction together."""
    compiling = ahead.get()
    amd = torch.version.hip is not None if compiling is None else compiling.arch.startswith("gfx")
    return 64 if amd else 32


def check_launchable(device: torch.device) -> None:
    """Raise RuntimeError unless Triton kernels can take tensors on a device here."""
    if device.type == "cuda" or interpreted() or ahead.get() is not None:
        return
    try:
        takes_cpu = driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:
        takes_cpu = False
    if device.type != "cpu" or not takes_cpu:
        raise RuntimeError(
            f"Triton kernels cannot take a tensor on {device} here: set TRITON_INTERPRET=1 before the first import of "
            "ditfast, or move the tensor to a GPU"
        )
