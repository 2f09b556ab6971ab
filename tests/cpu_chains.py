"""Chains of sublayers for the CPU engine, the same in float64, and small models, which several threads may call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeAlias

import torch
from hypothesis import strategies as st
from support import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import ditfast
from ditfast import DiT, DiTConfig, cpu

ANY_CHAIN = {  # for hypothesis, as random_chain takes it
    "B": st.integers(1, 5),
    "T": st.integers(1, 70),
    "heads": st.integers(1, 3),
    "head_dim": st.integers(1, 100),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "vectors": st.sampled_from(["sample", "token", "none"]),
}

SMALL = DiTConfig(depth=2, hidden_size=100, num_heads=5, input_size=(8, 12), num_classes=10)

Chain: TypeAlias = tuple[Tensor, list[cpu.Step], cpu.Final]


def inputs(config: DiTConfig, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, *config.input_shape, dtype=dtype)
    return x, torch.rand(batch) * 999, torch.randint(config.num_classes, (batch,))


def new_model(config: DiTConfig = SMALL, dtype: torch.dtype = torch.float32) -> DiT:
    return randomize(DiT(config)).eval().to(dtype)


def on_torch(model: torch.nn.Module, *given: Tensor) -> Tensor:
    with ditfast.backend("torch"):
        return model(*given)


def exact_chain(x: Tensor, steps: list[cpu.Step], final: cpu.Final) -> tuple[Tensor, Tensor]:
    def norm(shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
        shift, scale = (torch.zeros_like(x[:, 0]) if v is None else v.double() for v in (shift, scale))
        shift, scale = (v if v.dim() == 3 else v.unsqueeze(1) for v in (shift, scale))
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

    x = x.double()
    for products, shift, scale, gate, eps in steps:
        (first,), (second,) = products.first, products.second
        h = F.linear(norm(shift, scale, eps), *(part.double() for part in first))
        if products.kind == cpu.MLP:
            h = F.gelu(h, approximate="tanh")
        else:
            q, k, v = h.unflatten(-1, (3, products.heads, -1)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, *(part.double() for part in second))
        gate = torch.ones_like(x[:, 0]) if gate is None else gate.double()
        x = x + (gate if gate.dim() == 3 else gate.unsqueeze(1)) * h
    return x, norm(*final)


def random_chain(B: int, T: int, D: int, heads: int, dtype: torch.dtype, vectors: str) -> Chain:
    """Attention and an MLP; ``vectors`` are one a sample, one a token, or none."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(dtype)

    def vector() -> Tensor | None:
        if vectors == "none":
            return None
        return random(B, T, D, scale=0.3) if vectors == "token" else random(B, 6 * D, scale=0.3)[:, 2 * D : 3 * D]

    def linear(outputs: int, columns: int) -> cpu.Linears:
        return ((random(outputs, columns, scale=columns**-0.5), random(outputs)),)

    steps = [
        cpu.Step(cpu.Products(cpu.SELF_ATTENTION, linear(3 * D, D), linear(D, D), heads), vector(), vector(), vector(), 1e-6),
        cpu.Step(cpu.Products(cpu.MLP, linear(3 * D + 1, D), linear(D, 3 * D + 1)), vector(), vector(), vector(), 1e-5),
    ]
    return random(B, T, D), steps, cpu.Final(vector(), vector(), 1e-6)


def in_int8(steps: list[cpu.Step]) -> list[cpu.Step]:
    return [step._replace(products=step.products._replace(int8=True)) for step in steps]


def called_at_once(models: Sequence[nn.Module], given: Sequence[Tensor], times: int = 10) -> list[list[Tensor]]:
    """What each of the models returns, called again and again by a thread of its own."""
    found: list[list[Tensor]] = [[] for _ in models]

    def call(model: nn.Module, outputs: list[Tensor]) -> None:
        with torch.inference_mode():
            for _ in range(times):
                outputs.append(model(*given))

    threads = [threading.Thread(target=call, args=both) for both in zip(models, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(outputs) == times for outputs in found)
    return found
