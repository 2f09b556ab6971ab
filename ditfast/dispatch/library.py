"""Registration of ops with torch: for what traces and transforms calls, and for their gradients there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("ditfast", "DEF")


def define_op(
    schema: str,
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    run: Callable[..., Any],
) -> Callable[..., Any]:
    """Register ``ditfast::name``.

    Args:
        schema: as for ``torch.library.define``; the first tensor argument says where to run.
        fake: the same call on tensors without data, for torch.compile.
        save: ``save(ctx, inputs, output)`` keeps what the backward needs. Outputs that nothing used have no gradient
            there, where torch would make up zeros.
        backward: ``backward(ctx, *output_gradients)`` returns one gradient, or None, for each input. An op without one
            raises when somebody differentiates it.
        run: the op.
    """
    name = schema.partition("(")[0]

    def launch(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"ditfast::{name} has no forward-mode derivative; run it under ditfast.backend('torch')")
        return run(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if save is not None:
            save(ctx, inputs, output)

    def no_second_derivative(*_: Any) -> Any:
        raise RuntimeError(
            f"ditfast::{name} has no derivative; second derivatives need the forward to run under ditfast.backend('torch')"
        )

    _library.define(schema)
    _library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditfast::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"ditfast::{name}", backward or no_second_derivative, setup_context=setup_context, lib=_library
    )
    return getattr(torch.ops.ditfast, name).default
