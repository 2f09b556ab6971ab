"""The backward that the three row ops share: each is the joint between two sublayers, or a part of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch.op import TritonOp


def joint_backward(
    du: Tensor | None,
    dx_new: Tensor | None,
    x_new: Tensor | None,
    stats: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h, gate, shift and scale of ``x_new = x + gate * h``, ``u = LayerNorm(x_new) * (1 + scale) + shift``.

    Args:
        du: [B, T, D], gradient of u; None if nothing used it, and then x_new and stats are not read.
        dx_new: [B, T, D], gradient of x_new; None if nothing used it.
        x_new: [B, T, D], what was normalised.
        stats: [B, T, 3] fp32, its rows' statistics: ``(x_new - stats[0]) * stats[2] - stats[1]`` is LayerNorm.
        h: [B, T, D]; None if there is no gate.
        gate: [B, D] or [B, T, D], or None; then the gradient of h is that of x.
        shift: as gate.
        scale: as gate.
    """
    if du is None and dx_new is None:
        return (None,) * 5
    if du is None:
        x_new = stats = shift = scale = None
    found = iter(() if du is None and gate is None else _op(du, dx_new, x_new, stats, h, gate, shift, scale))
    dx = dx_new if du is None else next(found)
    dh = dx if gate is None else next(found)  # the sum passes its gradient on
    return dx, dh, *(None if vector is None else next(found) for vector in (gate, shift, scale))


def _fake(du: Tensor | None, dx_new: Any, x_new: Any, stats: Any, *others: Tensor | None) -> list[Tensor]:
    return [like.new_empty(like.shape) for like in (du, *others) if like is not None]


_op = TritonOp(
    "joint_backward(Tensor? du, Tensor? dx_new, Tensor? x_new, Tensor? stats, Tensor? h, Tensor? gate, Tensor? shift,"
    " Tensor? scale) -> Tensor[]",
    _fake,
)
