"""The one data flow through the blocks, over views of their weights.

Every home of a DiT hands its weights to ``run`` as views, so the flow is written once. A model is a chain of sublayers;
the end of each (gate, residual) and the start of the next (norm, modulation) are one kernel, across block ends and into the
output layer, so a block reads and writes its [B, T, D] stream 8 times where eager PyTorch does 30 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from . import cpu, ops
from .config import FIRST_NORM_EPS
from .plain import plain_weights


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
    int8: bool = False  # products on the CPU engine


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
    transform: SelfAttention | AttentionTo | Mlp
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
    found = run_on_cpu(x, chain, Norm())
    if found is not None:
        return found[0]  # [B, T, D]
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
    found = run_on_cpu(x, chain, final)
    if found is not None:
        return found[1]  # [B, T, D]
    x = x.contiguous()
    u = ops.layer_norm_modulate(x, *(chain[0].norm if chain else final))  # [B, T, D]
    return run(x, u, chain, final)[1]  # [B, T, D]


def run_on_cpu(x: Tensor, chain: Sequence[Sublayer], following: Norm) -> tuple[Tensor, Tensor] | None:
    """``run`` in one call, by the CPU engine or on torch's kernels; None where that is not for x, or a linear to be called."""
    if not cpu.takes(x):
        return None
    steps = []
    for (shift, scale, eps), transform, gate in chain:
        products = transform.products()
        if products is None:
            return None
        steps.append(cpu.Step(products, shift, scale, gate, eps))
    return cpu.run(x, steps, cpu.Final(*following))


def are_read(chain: Sequence[Sublayer]) -> bool:
    """Whether the CPU engine can have all of a chain's linears: nobody wants one of them to be called."""
    return all(sublayer.transform.products() is not None for sublayer in chain)


def sublayers(block: Block, modulation: Modulation, context: Tensor | None = None) -> list[Sublayer]:
    """A block as its two sublayers, or three with cross-attention to the context [B, 2, D]."""
    attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
    chain = [Sublayer(Norm(attn_shift, attn_scale, block.attn_norm_eps), SelfAttention(block), attn_gate)]
    if block.cross is not None and context is not None:
        chain.append(Sublayer(Norm(), AttentionTo(context, block.cross, block.num_heads, block.int8), None))
    chain.append(Sublayer(Norm(mlp_shift, mlp_scale, block.mlp_norm_eps), Mlp(block), mlp_gate))
    return chain


class SelfAttention(NamedTuple):
    block: Block

    def __call__(self, u: Tensor) -> Tensor:
        block = self.block
        heads = (block.num_heads, -1)
        qkv: Tensor | tuple[Tensor, Tensor, Tensor]
        if isinstance(block.qkv, SeparateQKV):
            q, k, v = (project(u, projection).unflatten(-1, heads) for projection in block.qkv)  # 3 x [B, T, H, d]
            qkv = (q, k, v)
        else:
            qkv = project(u, block.qkv).unflatten(-1, (3, *heads))  # [B, T, 3, H, d]
        return project(ops.attention(qkv, block.attention_engine), block.proj)  # [B, T, D]

    def products(self) -> cpu.Products | None:
        block = self.block
        first = linears(*block.qkv) if isinstance(block.qkv, SeparateQKV) else linears(block.qkv)
        second = linears(block.proj)
        if block.attention_engine is not None or not (first and second):
            return None
        return cpu.Products(cpu.SELF_ATTENTION, first, second, block.num_heads, int8=block.int8)


class AttentionTo(NamedTuple):
    context: Tensor
    weights: CrossAttention
    num_heads: int
    int8: bool = False

    def __call__(self, u: Tensor) -> Tensor:
        q = project(u, self.weights.q).unflatten(-1, (self.num_heads, -1))  # [B, T, H, d]
        kv = project(self.context, self.weights.kv).unflatten(-1, (2, self.num_heads, -1))  # [B, 2, 2, H, d]
        return project(ops.cross_attention(q, kv), self.weights.proj)  # [B, T, D]

    def products(self) -> cpu.Products | None:
        first, second, kv = linears(self.weights.q), linears(self.weights.proj), linears(self.weights.kv)
        if not (first and second and kv):
            return None
        return cpu.Products(cpu.CROSS_ATTENTION, first, second, self.num_heads, cpu.Context(self.context, *kv[0]), self.int8)


class Mlp(NamedTuple):
    block: Block

    def __call__(self, u: Tensor) -> Tensor:
        fc1, fc2 = self.block.fc1, self.block.fc2
        if isinstance(fc1, Linear) and isinstance(fc2, Linear):
            return ops.mlp(u, *fc1, *fc2)  # [B, T, D]
        return project(F.gelu(project(u, fc1), approximate="tanh"), fc2)  # [B, T, D]

    def products(self) -> cpu.Products | None:
        first, second = linears(self.block.fc1), linears(self.block.fc2)
        return cpu.Products(cpu.MLP, first, second, int8=self.block.int8) if first and second else None


def linears(*projections: Projection) -> cpu.Linears:
    """Their weights and biases; none where one of them wants to be called."""
    found = [projection for projection in projections if isinstance(projection, Linear)]
    return tuple((linear.weight, linear.bias) for linear in found) if len(found) == len(projections) else ()


def project(x: Tensor, projection: Projection) -> Tensor:
    return ops.linear(x, *projection) if isinstance(projection, Linear) else projection(x)


def view(linear: nn.Module) -> Projection:
    """A linear's weights, to be read; or the module, where it wants to be called."""
    weights = plain_weights(linear)
    return linear if weights is None else Linear(*weights)
