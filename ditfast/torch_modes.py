"""Modes of torch that decide what an op may do: tracing, transforms and autocast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func``, or forward-mode differentiation, is under way; kernels know neither."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, which would import all of torch.compile for it.
vars(is_transformed)["_dynamo_marked_constant"] = True


def computes_now() -> bool:
    """Return whether ops compute at once, on numbers that can be read: nothing traces, transforms or fakes them."""
    tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return not (tracing or torch._C._len_torch_dispatch_stack() or is_transformed())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype; None where autocast is off."""
    kind = "cpu" if device.type == "meta" else device.type  # torch has no autocast of tensors without data
    available = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)  # which takes a while to ask
    return torch.get_autocast_dtype(kind) if available and torch.is_autocast_enabled(kind) else None


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype, as torch casts the arguments of F.linear; the op behind does not see autocast.

    What is no tensor stays as it is, for the op's checks to refuse.
    """
    dtype = autocast_dtype(tensors[0].device) if isinstance(tensors[0], Tensor) else None
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a backward may follow. Always under ``torch.jit.trace``, whose check compares graphs of either mode."""
    if torch._C._get_tracing_state() is not None:  # torch.jit.is_tracing(), in one call
        return True
    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)
