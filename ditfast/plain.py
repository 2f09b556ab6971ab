"""Whether somebody expects a module to be called, so that reading its weights would not do."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

PLAIN_TYPES = (nn.Parameter, Tensor)


def is_unhooked(module: nn.Module) -> bool:
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])


def is_silent(module: nn.Module) -> bool:
    """Return True if nobody would notice that a module is not called: no hooks, no forward of its own, not compiled."""
    own = module.__dict__  # where reading is quick: this is asked of every layer at every forward
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl")
        or _has_any_global_hook()
    )


def plain_weights(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a Linear or Conv2d, if calling it is nothing but the product with the one and the sum with the other.

    Else somebody hooked, wrapped, replaced, parametrised or quantised it (LoRA, weight norm, offloading), and expects it to
    be called: None.
    """
    own = module.__dict__  # where reading is quick: this is asked of every linear at every forward
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    if (
        type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
        and is_silent(module)
        and type(weight) in PLAIN_TYPES
        and bias is not None
    ):
        return weight, bias
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether a Linear or Conv2d has ``plain_weights``."""
    return plain_weights(module) is not None
