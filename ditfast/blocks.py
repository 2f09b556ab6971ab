"""The one data flow through the blocks, over views of their weights.

Every home of a DiT hands its weights over as views, so the flow is written once. A model is a chain of sublayers; the end of
each (gate, residual) and the start of the next (norm, modulation) are one kernel, across block ends and into the
output layer, so a block reads and writes its [B, T, D] stream 8 times where eager PyTorch does 30 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

from torch import Tensor, nn
from torch.nn import functional as F

from . import cpu, ops
from .config import FIRST_NORM_EPS
from .ops import cpu_chain
from .plain import plain_weights


class Linear(NamedTuple):
    weight: Tensor
    bias: Tensor


Projection: TypeAlias = Linear | Callable[[Tensor], Tensor]  # weights to multiply with, or a module that wants to be called


class SeparateQKV(NamedTuple):
    q: Projection
    k: Projection
    v: Projection


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
    transform: SelfAttention | CrossAttention | Mlp | Called
    gate: Tensor | None


Segment: TypeAlias = Sequence[Sublayer] | Callable[[Tensor], Tensor]  # a block to fuse with its neighbors, or one to call
Run: TypeAlias = Callable[[Tensor, Tensor, Sequence[Sublayer], Norm | None], tuple[Tensor, Tensor | None]]


def run(x: Tensor, x_norm: Tensor, chain: Sequence[Sublayer], next_norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """Run x [B, T, D], and the same behind the chain's first norm, through the chain.

    Returns:
        The stream behind the chain, and the same behind ``next_norm``, if there is one.
    """
    norms = [sublayer.norm for sublayer in chain[1:]]
    for sublayer, norm in zip(chain, [*norms, next_norm], strict=True):
        h = sublayer.transform(x_norm)  # [B, T, D]
        if norm is None:
            return ops.gated_residual(x, h, sublayer.gate), None
        x, x_norm = ops.gated_residual_layer_norm_modulate(x, h, sublayer.gate, *norm)  # 2 x [B, T, D]
    return x, x_norm


def run_through(x: Tensor, segments: Sequence[Segment], final: Norm | None = None, run: Run = run) -> Tensor:
    """Run x [B, T, D] through blocks: called where they want to be, else fused with their neighbors.

    Args:
        x: the stream.
        segments: a block each.
        final: the norm behind the last block; None: what follows has its own.
        run: ``run``, or a function that calls it: once for each block that is fused, on a CPU without gradients never.

    Returns:
        [B, T, D], behind the final norm if there is one.
    """
    on_cpu = cpu_chain.takes(x)
    x_norm: Tensor | None = None  # x behind the norm that follows, where a fused block computed it
    for segment, next_norm in fused(segments, final, join=on_cpu):
        if callable(segment):
            x, x_norm = segment(x), None  # [B, T, D]
            continue
        result = run_on_cpu(x, segment, next_norm) if x_norm is None else None
        if result is None and x_norm is None:
            x = x.contiguous()
            x_norm = ops.layer_norm_modulate(x, *segment[0].norm)  # [B, T, D]
        x, x_norm = result or run(x, cast(Tensor, x_norm), segment, next_norm)  # [B, T, D]
    if final is None:
        return x
    return ops.layer_norm_modulate(x, *final) if x_norm is None else x_norm  # [B, T, D]


def fused(segments: Sequence[Segment], final: Norm | None, join: bool) -> list[tuple[Segment, Norm | None]]:
    """Return each segment with the norm that follows it, if one does; ``join`` makes one of all that lie side by side."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if not join or callable(segment) or last is None or callable(last):
            joined.append(segment)
        else:
            joined[-1] = [*last, *segment]
    norms = [None if callable(segment) else segment[0].norm for segment in joined]
    return list(zip(joined, [*norms[1:], final], strict=True))


def run_on_cpu(x: Tensor, chain: Sequence[Sublayer], next_norm: Norm | None) -> tuple[Tensor, Tensor | None] | None:
    """Run a chain in one call, by the CPU engine or on torch's kernels; None where that is not for x, or a linear to call."""
    steps = cpu_steps(chain) if cpu_chain.takes(x) else None
    result = None if steps is None else cpu_chain.run(x, steps, cpu.Final(*(next_norm or Norm())))
    return result if result is None or next_norm is not None else (result[0], None)


def cpu_steps(chain: Sequence[Sublayer]) -> list[cpu.Step] | None:
    """Return a chain as the CPU engine takes it; None if a linear wants to be called."""
    steps = []
    for (shift, scale, eps), transform, gate in chain:
        products = transform.products()
        if products is None:
            return None
        steps.append(cpu.Step(products, shift, scale, gate, eps))
    return steps


def are_read(chain: Sequence[Sublayer]) -> bool:
    """Whether the CPU engine can have all of a chain's linears: nobody wants one of them to be called."""
    return all(sublayer.transform.products() is not None for sublayer in chain)


def sublayers(
    modulation: Modulation,
    attn: SelfAttention | Called,
    mlp: Mlp | Called,
    cross: CrossAttention | Called | None = None,
    attn_norm_eps: float = FIRST_NORM_EPS,
    mlp_norm_eps: float = FIRST_NORM_EPS,
) -> list[Sublayer]:
    """Return a block as its two sublayers, or three with cross-attention."""
    attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
    chain = [Sublayer(Norm(attn_shift, attn_scale, attn_norm_eps), attn, attn_gate)]
    if cross is not None:
        chain.append(Sublayer(Norm(), cross, None))
    chain.append(Sublayer(Norm(mlp_shift, mlp_scale, mlp_norm_eps), mlp, mlp_gate))
    return chain


class Called(NamedTuple):
    """A sublayer's module that wants to be called, and what it is called with behind u [B, T, D]."""

    module: Callable[..., Tensor]
    others: tuple[Tensor, ...] = ()

    def __call__(self, u: Tensor) -> Tensor:
        return self.module(u, *self.others)  # [B, T, D]

    def products(self) -> cpu.Products | None:
        return None


class SelfAttention(NamedTuple):
    num_heads: int
    qkv: Projection | SeparateQKV
    proj: Projection
    engine: str | None = None  # None: the one expected to win
    int8: bool = False  # products on the CPU engine

    def __call__(self, u: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        qkv: Tensor | tuple[Tensor, Tensor, Tensor]
        if isinstance(self.qkv, SeparateQKV):
            q, k, v = (project(u, projection).unflatten(-1, heads) for projection in self.qkv)  # 3 x [B, T, H, d]
            qkv = (q, k, v)
        else:
            qkv = project(u, self.qkv).unflatten(-1, (3, *heads))  # [B, T, 3, H, d]
        return project(ops.attention(qkv, self.engine), self.proj)  # [B, T, D]

    def products(self) -> cpu.Products | None:
        first = linears(*self.qkv) if isinstance(self.qkv, SeparateQKV) else linears(self.qkv)
        second = linears(self.proj)
        if self.engine is not None or not (first and second):
            return None
        return cpu.Products(cpu.SELF_ATTENTION, first, second, self.num_heads, int8=self.int8)


class CrossAttention(NamedTuple):
    num_heads: int
    q: Projection
    kv: Projection
    proj: Projection
    context: Tensor  # [B, S, D]
    int8: bool = False

    def __call__(self, u: Tensor) -> Tensor:
        q = project(u, self.q).unflatten(-1, (self.num_heads, -1))  # [B, T, H, d]
        kv = project(self.context, self.kv).unflatten(-1, (2, self.num_heads, -1))  # [B, S, 2, H, d]
        return project(ops.cross_attention(q, kv), self.proj)  # [B, T, D]

    def products(self) -> cpu.Products | None:
        first, second, kv = linears(self.q), linears(self.proj), linears(self.kv)
        if not (first and second and kv):
            return None
        return cpu.Products(cpu.CROSS_ATTENTION, first, second, self.num_heads, cpu.Context(self.context, *kv[0]), self.int8)


class Mlp(NamedTuple):
    fc1: Projection
    fc2: Projection
    int8: bool = False

    def __call__(self, u: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if isinstance(fc1, Linear) and isinstance(fc2, Linear):
            return ops.mlp(u, *fc1, *fc2)  # [B, T, D]
        return project(F.gelu(project(u, fc1), approximate="tanh"), fc2)  # [B, T, D]

    def products(self) -> cpu.Products | None:
        first, second = linears(self.fc1), linears(self.fc2)
        return cpu.Products(cpu.MLP, first, second, int8=self.int8) if first and second else None


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
