"""int8 on the CPU engine: why a block cannot have it, and what it gains and costs a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import blocks, cpu
from .comparison import cast_inputs, example_call
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
    """Measure a module swapped like that, and ``inner`` submodules by their names, on random inputs of one sample each.

    The module is left as it is, and none of its hooks are called.
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

    example = cast_inputs(example_call(module, home).args, module)
    samples = len(next(value for value in example if isinstance(value, Tensor)))
    inputs = [tuple(value[i : i + 1] if isinstance(value, Tensor) else value for value in example) for i in range(samples)]
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return cpu.measure(twin, inputs, list(module.parameters()), switch)
