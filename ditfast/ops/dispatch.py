"""How an op picks its implementation, and how it is registered with torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
TRITON_OPS: list[str] = []  # filled by define_op

_library = torch.library.Library("ditfast", "DEF")
_forced: ContextVar[str | None] = ContextVar("ditfast.backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every op inside the ``with`` block, in this thread, onto plain torch or onto the Triton kernels.

    Without it CUDA tensors take Triton and CPU tensors torch. ``"triton"`` on CPU tensors runs in Triton's interpreter
    (TRITON_INTERPRET=1 before the first import of ditfast). A call that needs gradients takes torch whatever is forced.

    Raises:
        ValueError: the name is neither ``"torch"`` nor ``"triton"``.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def kernels() -> ModuleType:
    """``ditfast.kernels``, imported at the first launch: triton is slow to import, and absent on macOS and Windows."""
    if not has_triton():
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed: pip install triton (Linux)")
    import ditfast.kernels

    return ditfast.kernels


def choose_backend(device: torch.device) -> tuple[str, str]:
    """The backend that ops take for tensors on a device, and why."""
    forced = _forced.get()
    if forced is not None:
        return forced, "forced by ditfast.backend"
    if device.type != "cuda":
        return "torch", "only CUDA tensors take Triton unless ditfast.backend forces it"
    if not has_triton():
        return "torch", "triton is not installed"
    return "triton", "the default on CUDA"


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def takes_torch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether to call the torch version straight away: for gradients, and in eager mode where the op would only call it."""
    if needs_gradient(x, *others):
        return True
    return not torch.compiler.is_compiling() and choose_backend(x.device)[0] == "torch"


def define_op(
    schema: str, torch_version: Callable[..., Any], fake: Callable[..., Any], *, triton: bool = True
) -> Callable[..., Any]:
    """Registers ``ditfast::name``: at each call the launcher of that name in ``ditfast.kernels``, or ``torch_version``.

    The choice is made inside the op, at run time: a compiled graph follows ``ditfast.backend`` without recompiling.
    ``triton=False`` says that there is no such launcher.
    """
    name = schema.partition("(")[0]

    def implementation(*args: Any) -> Any:
        if not triton or choose_backend(args[0].device)[0] == "torch":
            return torch_version(*args)
        kernels().check_launchable(args[0])
        return getattr(kernels(), name)(*args)

    if triton:
        TRITON_OPS.append(name)
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditfast::{name}", fake, lib=_library)
    return getattr(torch.ops.ditfast, name).default
