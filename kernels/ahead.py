"""Compiling ahead of time: the very binaries that launches would run, for a target that need not be in this machine.

    with compiling_for("sm_90") as builds:
        layer_norm_modulate(x, shift, scale, 1e-6, training=False)  # launches nothing, writes nothing
    for build in builds:
        print(build.name, build.compiled.metadata.shared)

Arguments are specialised by Triton's own code, so a build has the hash, and takes the place in Triton's cache, of the kernel
that the same call would compile on that target. Tensors may be on the device "meta": nobody looks at their data.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from .launch import Ahead, ahead

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_86": GPUTarget("cuda", 86, 32),  # A10, RTX 3090
    "sm_89": GPUTarget("cuda", 89, 32),  # L4, L40S, RTX 4090
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 5090
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel for one target, as the first launch that asked for it would compile it."""

    kernel: Any
    arch: str
    source: ASTSource
    options: dict[str, Any]
    constants: dict[str, Any]
    grid: int
    tensor_bytes: int  # of all tensors passed, each once

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    @property
    def key(self) -> tuple[str, str]:
        return self.source.hash(), str(sorted(self.options.items(), key=str))

    @functools.cached_property
    def compiled(self) -> CompiledKernel:
        """Triton's binary and every stage before it, from Triton's cache where it is there."""
        return triton.compile(self.source, target=TARGETS[self.arch], options=self.options)


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[Sequence[Build]]:
    """Launches inside the ``with`` block, in this thread, are collected for ``arch`` instead: one ``Build`` of each kind.

    Needs no GPU and no driver. Compilation happens when a build's ``compiled`` is first read, on whatever thread.

    Raises:
        ValueError: no such target; the message names those there are.
        RuntimeError: kernels were jitted for the interpreter, which compiles nothing.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(TARGETS)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it before the first import of ditfast")
    builds: dict[tuple[str, str], Build] = {}
    listed: list[Build] = []

    def take(grid: int, kernel: Any, args: tuple[object, ...], options: dict[str, object]) -> None:
        build = _specialise(arch, grid, kernel, args, options)
        if builds.setdefault(build.key, build) is build:
            listed.append(build)

    token = ahead.set(Ahead(arch, take))
    try:
        yield listed
    finally:
        ahead.reset(token)


def _specialise(arch: str, grid: int, kernel: Any, args: tuple[object, ...], options: dict[str, object]) -> Build:
    """What ``JITFunction.run`` does between its arguments and the compiler, without the driver that it asks for the target."""
    options = options | {
        "debug": options.get("debug", kernel.debug) or triton.knobs.runtime.debug,
        "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
    }
    bind, backend = _binder(kernel, arch)
    bound, specialization, _ = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    names = list(bound)
    return Build(
        kernel,
        arch,
        ASTSource(kernel, signature, constants, attributes),
        parsed.__dict__,
        {names[path[0]]: value for path, value in constants.items() if len(path) == 1},
        grid,
        sum(arg.numel() * arg.itemsize for arg in args if isinstance(arg, Tensor)),
    )


@functools.cache
def _binder(kernel: Any, arch: str) -> tuple[Any, Any]:
    backend = make_backend(TARGETS[arch])
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend
