"""y = GELU(x @ fc1.T + bias) @ fc2.T + bias, as two GEMMs.

One kernel for both would need the [rows, D] accumulator of the second in registers while it streams all weights through every
program: it does not fit at any of the paper's widths. Of the hidden layer the backward keeps one tensor, not two: the
activation is recomputed in the epilogue that needs its derivative anyway.
"""

from __future__ import annotations

from torch import Tensor

from .linear import linear
from .linear_backward import bias_gradient, input_gradient, input_gradient_through_gelu, weight_gradient
from .linear_gelu import linear_gelu


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """x [..., K], fc1 [H, K], fc2 [N, H]. Returns y [..., N], and z as ``linear_gelu`` does."""
    hidden, z = linear_gelu(x, fc1_weight, fc1_bias, training)
    return linear(hidden, fc2_weight, fc2_bias), z


def mlp_backward(dy: Tensor, x: Tensor, z: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, needed: list[bool]) -> list[Tensor]:
    """Of dx and the gradients of fc1's weight and bias, fc2's weight and bias, those needed."""
    dy = dy.contiguous()
    dz, hidden = input_gradient_through_gelu(dy, fc2_weight, z)
    gradients = (
        lambda: input_gradient(dz, fc1_weight),
        lambda: weight_gradient(dz, x),
        lambda: bias_gradient(dz),
        lambda: weight_gradient(dy, hidden),
        lambda: bias_gradient(dy),
    )
    return [gradient() for gradient, need in zip(gradients, needed, strict=True) if need]
