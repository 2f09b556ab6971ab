"""Whether somebody expects a module to be called, so that reading its weights would not do."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_unhooked(module: nn.Module) -> bool:
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])


def is_silent(module: nn.Module) -> bool:
    """Whether nobody would notice that a module is not called: no hooks, no forward of its own, not compiled."""
    return (
        is_unhooked(module)
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not _has_any_global_hook()
    )


def is_plain(module: nn.Module) -> bool:
    """Whether calling a Linear or Conv2d is nothing but the product with its weight and the sum with its bias.

    Else somebody hooked, wrapped, replaced, parametrised or quantised it (LoRA, weight norm, offloading), and expects it to
    be called.
    """
    return (
        type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
        and "forward" not in vars(module)
        and is_unhooked(module)
        and module._parameters.get("bias") is not None
        and type(module._parameters.get("weight")) in (nn.Parameter, Tensor)
    )
