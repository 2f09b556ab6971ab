"""A chain on torch's kernels, for a CPU that has no engine: what the ops would compute, checked and launched with less ado."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..cpu.chain import MLP, DoesNotFit, Final, Products, Step, check_context, check_vector, check_weights, dtype_of_weights
from .cpu_products import attention_for, linear_for
from .gated_residual import torch_gated_residual
from .layer_norm_modulate import torch_layer_norm_modulate
from .torch_gelu import torch_gelu

OfThree: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(x: Tensor, steps: Sequence[Step], final: Final) -> tuple[Tensor, Tensor]:
    """x [B, T, D] through the steps, and that after the final norm: both of the dtype of x, as is all between them.

    Raises:
        DoesNotFit: weights or vectors that are not for x.
    """
    _check(x, steps, final)
    x = x.contiguous()
    linear, attention = linear_for(x), attention_for(x)
    for products, shift, scale, gate, eps in steps:
        u = torch_layer_norm_modulate(x, shift, scale, eps)  # [B, T, D]
        x = torch_gated_residual(x, _multiplied(u, products, linear, attention), gate)  # [B, T, D]
    return x, torch_layer_norm_modulate(x, *final)


def _check(x: Tensor, steps: Sequence[Step], final: Final) -> None:
    dtype = dtype_of_weights(x)
    B, T, D = x.shape
    shapes = torch.Size((B, D)), torch.Size((B, T, D))
    vectors = [final.shift, final.scale]
    for products, shift, scale, gate, _ in steps:
        vectors += (shift, scale, gate)
        check_weights(products, dtype)
        if products.context is not None:
            check_context(products.context, B, D, dtype)
        if products.first[0][0].shape[1] != D:
            raise DoesNotFit
    for vector in vectors:
        if vector is not None:
            check_vector(vector, shapes)


def _multiplied(u: Tensor, products: Products, linear: OfThree, attention: OfThree) -> Tensor:
    """A sublayer, up to its gate."""
    (last,) = products.second
    if products.kind == MLP:
        return linear(torch_gelu(linear(u, *products.first[0])), *last)  # [B, T, D]
    first, heads = [linear(u, *each) for each in products.first], (products.heads, -1)
    if products.context is not None:
        q = first[0].unflatten(-1, heads)  # [B, T, H, d]
        k, v = linear(*products.context).unflatten(-1, (2, *heads)).unbind(2)  # 2 x [B, S, H, d]
    elif len(first) == 1:
        q, k, v = first[0].unflatten(-1, (3, *heads)).unbind(2)  # 3 x [B, T, H, d]
    else:
        q, k, v = (part.unflatten(-1, heads) for part in first)  # 3 x [B, T, H, d]
    return linear(attention(q, k, v), *last)  # [B, T, D]
