"""Where kernels run: the launch itself, and what stands behind Triton on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver


class Ahead(NamedTuple):
    """Takes launches instead of a device, for kernels.ahead: their grid, kernel, arguments and options."""

    arch: str
    take: Callable[[int, Any, tuple[object, ...], dict[str, object]], None]


ahead: ContextVar[Ahead | None] = ContextVar("ditfast.ahead", default=None)


def launch(kernel: Any, grid: int, *args: object, **options: object) -> None:
    """Starts ``grid`` programs of a jitted kernel on the current device and stream; none for an empty grid."""
    if grid == 0:
        return
    # Triton 3.9 warns where the choice is left open; products and sums of our kernels are meant to fuse.
    options["enable_fp_fusion"] = True
    compiling = ahead.get()
    if compiling is not None:
        compiling.take(grid, kernel, args, options)
        return
    kernel[(grid,)](*args, **options)


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


def check_launchable(tensor: Tensor) -> None:
    """Raises RuntimeError unless Triton kernels can take this tensor here."""
    if tensor.device.type == "cuda" or interpreted() or ahead.get() is not None:
        return
    try:
        takes_cpu = driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:
        takes_cpu = False
    if tensor.device.type != "cpu" or not takes_cpu:
        raise RuntimeError(
            f"Triton kernels cannot take a tensor on {tensor.device} here: set TRITON_INTERPRET=1 before the first import of "
            "ditfast, or move the tensor to a GPU"
        )
