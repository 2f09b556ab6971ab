"""The one data flow through the blocks, over views of their weights.

Every home of a DiT hands its weights to ``run`` as views, so the flow is written once. A model is a chain of sublayers;
the end of each (gate, residual) and the start of the next (norm, modulation) are one kernel, across block ends and into the
output layer, so a block reads and writes its [B, T, D] stream 8 times where eager PyTorch does 30 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, cast

from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .config import FIRST_NORM_EPS
from .plain import is_plain


class Linear(NamedTuple):
    weight: Tensor
    bias: Tensor


Projection: TypeAlias = Linear | Callable[[Tensor], Tensor]  # weights to multiply with, or a module that wants to be called


class SeparateQKV(NamedTuple):
    q: Projection
    k: Projection
    v: Projection


class CrossAttention(NamedTuple):
    q: Projection
    kv: Projection
    proj: Projection


class Block(NamedTuple):
    """One block's weights."""

    num_heads: int
    mlp_norm_eps: float
    qkv: Projection | SeparateQKV
    proj: Projection
    fc1: Projection
    fc2: Projection
    cross: CrossAttention | None = None
    attn_norm_eps: float = FIRST_NORM_EPS
    attention_engine: str | None = None  # None: the one expected to win


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


Stop: TypeAlias = Sequence[Sublayer] | Callable[[Tensor], Tensor]  # a block to fuse with its neighbours, or one to call


def run(x: Tensor, u: Tensor, chain: Sequence[Sublayer], following: Norm) -> tuple[Tensor, Tensor]:
    """x [B, T, D] and u, x as the chain's first norm leaves it, through the chain; ``following`` is the norm behind it."""
    norms = [sublayer.norm for sublayer in chain] + [following]
    for sublayer, norm in zip(chain, norms[1:], strict=True):
        h = sublayer.transform(u)  # [B, T, D]
        x, u = ops.gated_residual_layer_norm_modulate(x, h, sublayer.gate, *norm)  # 2 x [B, T, D]
    return x, u


def run_alone(x: Tensor, chain: Sequence[Sublayer]) -> Tensor:
    """x [B, T, D] through a chain that somebody else's code surrounds."""
    if not chain:
        return x
    *others, last = chain
    x = x.contiguous()
    u = ops.layer_norm_modulate(x, *chain[0].norm)  # [B, T, D]
    x, u = run(x, u, others, last.norm)  # 2 x [B, T, D]
    return ops.gated_residual(x, last.transform(u), last.gate)  # [B, T, D]


def run_through(x: Tensor, stops: Sequence[Stop], final: Norm) -> Tensor:
    """x [B, T, D] through a model's blocks and its final norm: chains side by side become one."""
    chain: list[Sublayer] = []
    for stop in stops:
        if callable(stop):
            x = stop(run_alone(x, chain))  # [B, T, D]
            chain = []
        else:
            chain += stop
    x = x.contiguous()
    u = ops.layer_norm_modulate(x, *(chain[0].norm if chain else final))  # [B, T, D]
    return run(x, u, chain, final)[1]  # [B, T, D]


def sublayers(block: Block, modulation: Modulation, context: Tensor | None = None) -> list[Sublayer]:
    """A block as its two sublayers, or three with cross-attention to the context [B, 2, D]."""
    attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
    chain = [Sublayer(Norm(attn_shift, attn_scale, block.attn_norm_eps), partial(self_attention, block=block), attn_gate)]
    if block.cross is not None and context is not None:
        attend = partial(cross_attention, context=context, weights=block.cross, num_heads=block.num_heads)
        chain.append(Sublayer(Norm(), attend, None))
    chain.append(Sublayer(Norm(mlp_shift, mlp_scale, block.mlp_norm_eps), partial(mlp, block=block), mlp_gate))
    return chain


def self_attention(u: Tensor, block: Block) -> Tensor:
    heads = (block.num_heads, -1)
    qkv: Tensor | tuple[Tensor, Tensor, Tensor]
    if isinstance(block.qkv, SeparateQKV):
        q, k, v = (project(u, projection).unflatten(-1, heads) for projection in block.qkv)  # 3 x [B, T, H, d]
        qkv = (q, k, v)
    else:
        qkv = project(u, block.qkv).unflatten(-1, (3, *heads))  # [B, T, 3, H, d]
    return project(ops.attention(qkv, block.attention_engine), block.proj)  # [B, T, D]


def cross_attention(u: Tensor, context: Tensor, weights: CrossAttention, num_heads: int) -> Tensor:
    q = project(u, weights.q).unflatten(-1, (num_heads, -1))  # [B, T, H, d]
    kv = project(context, weights.kv).unflatten(-1, (2, num_heads, -1))  # [B, 2, 2, H, d]
    return project(ops.cross_attention(q, kv), weights.proj)  # [B, T, D]


def mlp(u: Tensor, block: Block) -> Tensor:
    if isinstance(block.fc1, Linear) and isinstance(block.fc2, Linear):
        return ops.mlp(u, *block.fc1, *block.fc2)  # [B, T, D]
    return project(F.gelu(project(u, block.fc1), approximate="tanh"), block.fc2)  # [B, T, D]


def project(x: Tensor, projection: Projection) -> Tensor:
    return ops.linear(x, *projection) if isinstance(projection, Linear) else projection(x)


def view(linear: nn.Module) -> Projection:
    """A linear's weights, to be read; or the module, where it wants to be called."""
    return Linear(cast(Tensor, linear.weight), cast(Tensor, linear.bias)) if is_plain(linear) else linear
