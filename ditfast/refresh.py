"""What is kept of a model's weights, forgotten: after writes that torch does not see."""

from __future__ import annotations

from torch import nn

from . import cpu
from .argument_checks import check_type
from .homes.home import swap_in
from .model import DiT


def refresh(model: nn.Module) -> None:
    """Forget all that is kept of a model's weights: packed for the CPU engine, cast, compared, or multiplied into modulation.

    Needed only after writes that neither torch nor Python can tell of: in part, through ``.data``, a NumPy view or in
    inference mode. Those into weights that the CPU engine has packed are noticed without it, a few forwards late.

    Args:
        model: a ``ditfast.DiT``, one that was given to ``ditfast.accelerate``, or a module that has such inside.

    Raises:
        TypeError: the model is no module.
    """
    check_type("model", model, nn.Module, "a module")
    cpu.forget([*model.parameters(), *model.buffers()])
    for module in model.modules():
        if isinstance(module, DiT):
            module._reading.forget()
        swap = swap_in(module)
        if swap is not None:
            swap.caches.clear()
