"""The one data flow through the blocks, over views of their weights.

Every home of a DiT hands its weights to ``run`` as views, so the flow is written once. A model is a chain of sublayers;
the end of each (gate, residual) and the start of the next (norm, modulation) are one kernel, across block ends and into the
output layer, so a block reads and writes its [B, T, D] stream 8 times where eager PyTorch does 30 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from . import ops
from .config import FIRST_NORM_EPS


class Linear(NamedTuple):
    weight: Tensor
    bias: Tensor


class CrossAttention(NamedTuple):
    q: Linear
    kv: Linear
    proj: Linear


class Block(NamedTuple):
    """One block's weights."""

    num_heads: int
    mlp_norm_eps: float
    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear
    cross: CrossAttention | None = None


class Modulation(NamedTuple):
    """One block's vectors, each [B, D] or [B, T, D]; None where the design has none."""

    attn_shift: Tensor | None = None
    attn_scale: Tensor | None = None
    attn_gate: Tensor | None = None
    mlp_shift: Tensor | None = None
    mlp_scale: Tensor | None = None
    mlp_gate: Tensor | None = None


class Norm(NamedTuple):
    shift: Tensor | None = None
    scale: Tensor | None = None
    eps: float = FIRST_NORM_EPS


class Sublayer(NamedTuple):
    """``x + gate * transform(norm(x))``"""

    norm: Norm
    transform: Callable[[Tensor], Tensor]
    gate: Tensor | None


def run(x: Tensor, chain: Sequence[Sublayer], final: Norm) -> Tensor:
    """The chain of sublayers over x [B, T, D], then the final norm: what the output linear reads, [B, T, D]."""
    norms = [sublayer.norm for sublayer in chain] + [final]
    u = ops.layer_norm_modulate(x, *norms[0])  # [B, T, D]
    for sublayer, following in zip(chain, norms[1:], strict=True):
        h = sublayer.transform(u)  # [B, T, D]
        x, u = ops.gated_residual_layer_norm_modulate(x, h, sublayer.gate, *following)  # 2 x [B, T, D]
    return u


def sublayers(block: Block, modulation: Modulation, context: Tensor) -> list[Sublayer]:
    """A block as its two sublayers, or three with cross-attention to the context [B, 2, D]."""
    attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
    chain = [Sublayer(Norm(attn_shift, attn_scale), partial(self_attention, block=block), attn_gate)]
    if block.cross is not None:
        attend = partial(cross_attention, context=context, weights=block.cross, num_heads=block.num_heads)
        chain.append(Sublayer(Norm(), attend, None))
    chain.append(Sublayer(Norm(mlp_shift, mlp_scale, block.mlp_norm_eps), partial(mlp, block=block), mlp_gate))
    return chain


def self_attention(u: Tensor, block: Block) -> Tensor:
    qkv = ops.linear(u, *block.qkv).unflatten(-1, (3, block.num_heads, -1))  # [B, T, 3, H, d]
    return ops.linear(ops.attention(qkv), *block.proj)  # [B, T, D]


def cross_attention(u: Tensor, context: Tensor, weights: CrossAttention, num_heads: int) -> Tensor:
    q = ops.linear(u, *weights.q).unflatten(-1, (num_heads, -1))  # [B, T, H, d]
    kv = ops.linear(context, *weights.kv).unflatten(-1, (2, num_heads, -1))  # [B, 2, 2, H, d]
    return ops.linear(ops.cross_attention(q, kv), *weights.proj)  # [B, T, D]


def mlp(u: Tensor, block: Block) -> Tensor:
    return ops.mlp(u, *block.fc1, *block.fc2)  # [B, T, D]
