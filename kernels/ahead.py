"""Compiling ahead of time: the very binaries that launches would run, for a target that need not be in this machine.

    with compiling_for("sm_90") as builds:
        layer_norm_modulate(x, shift, scale, 1e-6, training=False)  # launches nothing, writes nothing
    for build in builds:
        print(build.name, build.compiled.metadata.shared)

Arguments are specialised by Triton's own code, so a build has the hash, and takes the place in Triton's cache, of the kernel
that the same call would compile on that target. Tensors may be on the device "meta", or fake: nobody looks at their data, and
every storage counts as aligned, as allocators align them.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from .launch import Ahead, ahead

Item = TypeVar("Item")
Result = TypeVar("Result")

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


class Outcome(NamedTuple):
    """What became of a build."""

    build: Build
    seconds: float
    cached: bool  # it was in Triton's cache already
    error: str = ""  # why it does not compile


def compile_all(builds: Sequence[Build], jobs: int) -> Iterator[Outcome]:
    """Into Triton's cache (TRITON_CACHE_DIR), in order, on ``jobs`` threads: most of the time goes by outside of Python."""
    hits = threading.local()

    def listen(*, cache_hit: bool, **_: object) -> None:
        hits.last = cache_hit

    def outcome(build: Build) -> Outcome:
        start, hits.last = time.perf_counter(), True  # nobody tells of a build that is in memory
        try:
            build.compiled  # noqa: B018 (compiles)
        except Exception as error:  # of the compiler's many parts
            return Outcome(build, time.perf_counter() - start, False, f"{type(error).__name__}: {error}")
        return Outcome(build, time.perf_counter() - start, hits.last)

    knobs = triton.knobs.compilation
    before, knobs.listener = knobs.listener, listen
    try:
        yield from on_threads(outcome, builds, jobs)
    finally:
        knobs.listener = before


def on_threads(compile_one: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """Results in order. After Ctrl-C, what has begun is compiled to its end before the process ends, the rest never."""
    pool, wait = ThreadPoolExecutor(jobs, initializer=_keep_ctrl_c_from_compilers), True
    try:
        yield from pool.map(compile_one, items)
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


def _keep_ctrl_c_from_compilers() -> None:
    """Block the signal in a thread, and in what it starts: where a signal ends ptxas, Triton shows the kernel's whole PTX."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


class Argument:
    """A tensor as Triton specialises it for, wherever its storage will be."""

    def __init__(self, tensor: Tensor):
        self.dtype: torch.dtype = tensor.dtype
        self._tensor = tensor

    def data_ptr(self) -> int:
        return int(self._tensor.storage_offset() * self._tensor.itemsize)

    def ptr_range(self) -> int:
        """Bytes of the storage: AMD's compiler takes other loads within 2 GB."""
        return int(self._tensor.untyped_storage().nbytes())


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

    def take(kernel: Any, grid: int, arguments: dict[str, object]) -> None:
        build = _specialise(arch, kernel, grid, arguments)
        if builds.setdefault(build.key, build) is build:
            listed.append(build)

    token = ahead.set(Ahead(arch, take))
    try:
        yield listed
    finally:
        ahead.reset(token)


def _specialise(arch: str, kernel: Any, grid: int, arguments: dict[str, object]) -> Build:
    """What ``JITFunction.run`` does between its arguments and the compiler, without the driver that it asks for the target."""
    tensors = [argument for argument in arguments.values() if isinstance(argument, Tensor)]
    passed = {name: Argument(argument) if isinstance(argument, Tensor) else argument for name, argument in arguments.items()}
    passed["debug"] = passed.get("debug", kernel.debug) or triton.knobs.runtime.debug
    passed["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
    bind, backend = _binder(kernel, arch)
    bound, specialization, options = bind(**passed)
    parsed, signature, constants, attributes = kernel._pack_args(backend, passed, bound, specialization, options)
    names = list(bound)
    return Build(
        kernel,
        arch,
        ASTSource(kernel, signature, constants, attributes),
        parsed.__dict__,
        {names[path[0]]: value for path, value in constants.items() if len(path) == 1},
        grid,
        sum(tensor.numel() * tensor.itemsize for tensor in tensors),
    )


@functools.cache
def _binder(kernel: Any, arch: str) -> tuple[Any, Any]:
    backend = make_backend(TARGETS[arch])
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend
