"""Backend selection: an override, else what was measured on the device, else the default; and why, in words."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..torch_modes import is_transformed
from . import override as overrides
from . import tuning_cache
from .backends import BACKENDS, Choice, default, has_triton, library_attention, why_not
from .override import current_override
from .plan import forget_plans
from .shapes import SIZES, OpShape, size_names
from .tuning_cache import Entry

recorders: list[Callable[[OpShape], None]] = []
IN_TORCH = ("torch", "sdpa", "linears")  # what transforms go through: plain torch, and ops made of other ops
NOT_CUDA = Choice("torch", "only CUDA tensors take Triton unless ditfast.backend forces it")


def choose(device: torch.device, shape: OpShape) -> Choice:
    """Return the backend that an op takes for tensors on a device, and why: forced, measured or the default.

    Raises:
        ValueError: there is no such op, or it has other sizes.
        RuntimeError: attention is forced onto a backend that cannot run; the message says why, and what to do.
    """
    if shape.op not in SIZES:
        size_names(shape.op)
    override = overrides._latest if torch.compiler.is_compiling() else overrides._override.get()
    if override.trial is not None and override.trial[0] == shape.op:
        return Choice(override.trial[1], "on trial")
    if shape.op == "attention":
        if override.attention is not None:
            check_possible(override.attention, device, shape)
            return Choice(override.attention, "forced by ditfast.attention_engine")
        if override.backend == "triton":
            check_possible("triton", device, shape)
            return Choice("triton", "forced by ditfast.backend")
        if override.backend == "torch" or device.type != "cuda":
            return library_attention(device, shape)
    elif override.backend is not None:
        return Choice(override.backend, "forced by ditfast.backend")
    elif device.type != "cuda":
        return NOT_CUDA
    if torch.compiler.is_compiling():
        return Choice(_selected(device, *shape.bucket()), "as when it was traced")
    return select(device, shape)


def select_backend(x: Tensor, op: str, rows: int, sizes: tuple[int, ...], training: bool = False) -> str:
    """Return the backend that an op takes for x and these sizes."""
    shape = OpShape(op, x.dtype, rows, sizes, training)
    for record in recorders:
        record(shape)
    return choose(x.device, shape).backend


def untransformed(op: str, backend: str, is_asked: bool = False) -> str:
    """Return the backend, or the one in plain torch where a transform is under way and nothing forces another.

    Raises:
        RuntimeError: kernels are forced that no transform goes through.
    """
    if backend in IN_TORCH or not is_transformed():
        return backend
    override = current_override()
    if not (is_asked or override.trial or override.backend == "triton" or (op == "attention" and override.attention)):
        return "sdpa" if op == "attention" else "torch"
    raise RuntimeError(
        f"{op}: forward-mode derivatives and torch.func's transforms do not go through its kernels ({backend!r}); "
        "run it under ditfast.backend('torch')"
    )


@contextlib.contextmanager
def record_calls(record: Callable[[OpShape], None]) -> Iterator[None]:
    """Call ``record`` with the shape of each op that is called inside the ``with`` block."""
    recorders.append(record)
    try:
        yield
    finally:
        recorders.remove(record)


def check_possible(backend: str, device: torch.device, shape: OpShape) -> None:
    """Raise RuntimeError if attention cannot run on a backend; the message says why, and what to do."""
    why = why_not(backend, device, shape)
    if why:
        raise RuntimeError(
            f"attention was forced onto {backend!r}, but {why}: ditfast.attention_engine('sdpa') takes any input"
        )


def _selected(device: torch.device, op: str, dtype: torch.dtype, rows: int, sizes: tuple[int, ...], training: bool) -> str:
    """For a compiled graph, which holds what was known when it was traced."""
    return select(device, OpShape(op, dtype, rows, sizes, training)).backend


# What torch.compiler.assume_constant_result does, which would import all of torch.compile for it.
vars(_selected)["_dynamo_marked_constant"] = True


@functools.lru_cache(4096)
def select(device: torch.device, shape: OpShape) -> Choice:
    """Return the backend that was measured to be fastest on a CUDA device, else the default."""
    bucket = shape.bucket()
    possible = [backend for backend in BACKENDS[shape.op] if not why_not(backend, device, bucket)]
    entry = measured(device).get(bucket)
    if entry is not None and entry.ms.keys() & set(possible):
        return _fastest(entry, possible)
    return default(device, bucket)


@functools.cache
def measured(device: torch.device) -> Mapping[OpShape, Entry]:
    """Return the device's tuning cache, read once; nothing where there is no such device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    return tuning_cache.of_device(torch.cuda.get_device_name(device))


def _fastest(entry: Entry, possible: list[str]) -> Choice:
    """Plain torch, which comes first, where it is as fast."""
    times = {backend: entry.ms[backend] for backend in possible if backend in entry.ms}
    backend = min(times, key=lambda backend: times[backend])
    others = [f", {name} {1e3 * ms:.3g} us" for name, ms in times.items() if name != backend]
    excluded = [f"; {name} excluded: {why}" for name, why in entry.excluded.items() if name in possible]
    return Choice(backend, f"measured {1e3 * times[backend]:.3g} us{''.join(others)}{''.join(excluded)}")


@functools.cache
def use_measured_configs(device: torch.device) -> None:
    """Hand the kernel configs of the device's tuning cache to the launchers."""
    configs = {key: config for entry in measured(device).values() for key, config in entry.configs.items()}
    if configs and has_triton():
        from ditfast.kernels import tiles

        tiles.replace(tiles.TILES | {tiles.Key(*key): config for key, config in configs.items()})


def forget() -> None:
    """Read tuning caches again at the next choice; what torch.compile has traced stays as it is."""
    for cached in (measured, select, use_measured_configs):
        cached.cache_clear()
    if "ditfast.kernels" in sys.modules:
        sys.modules["ditfast.kernels"].tiles.replace({})
    forget_plans()
