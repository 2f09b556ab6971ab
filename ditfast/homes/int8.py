"""int8 on the CPU engine: why a block cannot have it, and what it gains and costs a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import blocks, cpu
from .copies import copy_of
from .home import BlockHome, Foreign, Home, Options, Swap


def why_not_int8(block: nn.Module, home: Home) -> str:
    """Empty if the CPU engine multiplies the block's linears in int8."""
    others = cpu.unfit(block.parameters())
    if others:
        return f"int8 is for fp32 or bf16 weights on the CPU, not for {others}"
    if not isinstance(home, BlockHome) or not blocks.are_read(home.chain(Swap(block, home, Options()), blocks.Modulation())):
        return "its linears are called one by one, and int8 is for chains of them on the CPU engine"
    return ""


def cost_of_int8(module: nn.Module, home: Home, inner: Mapping[str, Home]) -> cpu.Cost:
    """Measure a module swapped like that on a few random inputs of one sample each.

    Args:
        module: it is left as it is, and none of its hooks are called.
        home: its family.
        inner: the names of submodules that are swapped as well, and their families.
    """
    twin = copy_of(module, {}, convert=lambda tensor: tensor).eval()
    swaps = []
    for name, family in {**inner, "": home}.items():
        part: Foreign = twin.get_submodule(name)
        part.forward = Swap(part, family, Options())
        swaps.append(part.forward)

    def switch(on: bool) -> None:
        for swap in swaps:
            swap.options = Options(int8=on)

    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    with torch.device("cpu"):
        example = [
            value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in home.example(module, torch.Generator().manual_seed(0))
        ]
    samples = len(next(value for value in example if isinstance(value, Tensor)))
    inputs = [tuple(value[i : i + 1] if isinstance(value, Tensor) else value for value in example) for i in range(samples)]
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return cpu.measure(twin, inputs, list(module.parameters()), switch)
