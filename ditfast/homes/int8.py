"""int8 on the CPU engine: why a block cannot have it, and what it gains and costs a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import blocks, cpu
from .home import BlockHome, Home, Options, Swap
from .probe import example_of, swapped_copy, without_autocast


def why_not_int8(block: nn.Module, home: Home) -> str:
    """Empty if the CPU engine multiplies the block's linears in int8."""
    others = cpu.unfit(block.parameters())
    if others:
        return f"int8 is for fp32 or bf16 weights on the CPU, not for {others}"
    if not isinstance(home, BlockHome) or not blocks.are_read(home.chain(Swap(block, home, Options()), blocks.Modulation())):
        return "its linears are called one by one, and int8 is for chains of them on the CPU engine"
    return ""


def cost_of_int8(module: nn.Module, home: Home, inner: Mapping[str, Home]) -> cpu.Cost:
    """Of a module swapped like that, by a few random inputs of one sample each; its arguments are ``probe``'s."""
    twin, swaps = swapped_copy(module, {**inner, "": home})

    def switch(on: bool) -> None:
        for swap in swaps:
            swap.options = Options(int8=on)

    example = example_of(module, home, torch.Generator().manual_seed(0))
    samples = len(next(value for value in example if isinstance(value, Tensor)))
    inputs = [tuple(value[i : i + 1] if isinstance(value, Tensor) else value for value in example) for i in range(samples)]
    with without_autocast("cpu"), torch.no_grad():
        return cpu.measure(twin, inputs, list(module.parameters()), switch)
