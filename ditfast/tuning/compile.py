"""Kernels compiled before they are timed: all configs of a shape at once, on every core, into Triton's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ahead import Launching
from ..dispatch.backends import why_not
from ..dispatch.launchers import triton_kernels
from ..dispatch.override import on_trial
from ..dispatch.shapes import OpShape
from .examples import example

CPU = torch.device("cpu")


def compile_kernels(
    shapes: Iterable[OpShape],
    device: torch.device,
    every_config: bool,
    in_time: Callable[[], bool],
    show: Callable[[int, int], None],
) -> None:
    """Compile what the Triton backend of shapes launches; what does not compile is left to whoever launches it.

    Args:
        shapes: to be measured.
        device: what the kernels are for; nothing runs on it.
        every_config: in all configs that may be measured, else in the built-in ones.
        in_time: asked after each kernel; those that have begun are compiled to their end.
        show: is told how many of how many are done.
    """
    arch = _arch(device)
    if arch is None:
        return
    builds = {build.key: build for shape in shapes for build in kernel_builds(shape, arch, every_config)}
    from ditfast.kernels.ahead import compile_all

    show(0, len(builds))
    for done, _ in enumerate(compile_all(list(builds.values()), os.cpu_count() or 1), start=1):
        show(done, len(builds))
        if not in_time():
            break


def kernel_builds(shape: OpShape, arch: str, every_config: bool) -> list[Any]:
    """Return one ``kernels.ahead.Build`` of each kernel that the Triton backend launches, found without data."""
    from ditfast.kernels.ahead import compiling_for

    if why_not("triton", CPU, shape):
        return []
    tiles = triton_kernels().tiles
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with compiling_for(arch) as builds, fake, Launching(), on_trial(shape.op, "triton"):
        one = example(shape, CPU, seed=0)  # which launches too, to see the outputs of a step
        with tiles.asking() as asked:
            one.run()
        for key, configs in asked.items():
            for config in configs[1:] if every_config else ():
                with tiles.trying({key: config}):
                    one.run()
    return list(builds)


def _arch(device: torch.device) -> str | None:
    """None where nothing can be compiled ahead: without Triton, in its interpreter, for an architecture not listed."""
    if why_not("triton", device, OpShape("linear", torch.float32, 1, (1, 1))):
        return None
    from ditfast.kernels.ahead import TARGETS

    with triton_kernels().current_device(device) if device.type == "cuda" else nullcontext():
        try:
            arch = triton_kernels().target()
        except RuntimeError:
            return None
    return arch if arch in TARGETS else None
