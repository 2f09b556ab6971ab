"""One random input through a module and through its fast forward, on copies that share the module's weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .home import Foreign, Home, Mismatch, Options, Swap

# Two right ways to compute the same differ by less, also where one of them takes TF32; a forward built otherwise by more.
TOLERANCES = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def probe(module: Foreign, home: Home, inner: Mapping[str, Home]) -> str:
    """Why a module must not be swapped: it and its swapped form compute different things, or one cannot. Else empty.

    Args:
        module: it is left as it is, and none of its hooks are called.
        home: its family.
        inner: the names of submodules that are swapped as well, and their families.
    """
    try:
        _compare_forwards(module, home, inner)
    except Mismatch as mismatch:
        return str(mismatch)
    except Exception as error:  # anything may come out of somebody else's code
        return f"a random input raised {in_one_line(error)}"
    return ""


def in_one_line(error: Exception) -> str:
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


@torch.no_grad()
def _compare_forwards(module: Foreign, home: Home, inner: Mapping[str, Home]) -> None:
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if weight is None or weight.is_meta or weight.dtype not in TOLERANCES:
        got = "not there" if weight is None else "on the meta device" if weight.is_meta else weight.dtype
        raise Mismatch(f"its weights are {got}, expected fp32, bf16 or fp16")
    generator = torch.Generator().manual_seed(0)
    arguments = example_of(module, home, generator)
    original, (swapped, swaps) = _copy(module), swapped_copy(module, {**inner, "": home})
    _give_values(home.zero_at_first(original), home.zero_at_first(swapped), generator)
    if not all(swap.is_as_found() for swap in swaps):
        raise Mismatch("the forward of a part of it was replaced before")
    with without_autocast(weight.device.type):
        _compare(original(*arguments), swapped(*arguments), TOLERANCES[weight.dtype])


def example_of(module: Foreign, home: Home, generator: torch.Generator) -> list[Any]:
    """Arguments of a forward, where and of which dtype the module's weights are."""
    weight = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    with torch.device("cpu"):
        example = home.example(module, generator)
    return [
        value.to(weight.device, weight.dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for value in example
    ]


def swapped_copy(module: nn.Module, homes: Mapping[str, Home]) -> tuple[nn.Module, list[Swap]]:
    """The module in eval mode with its own weights, without anybody's hooks, its parts swapped; and the swaps."""
    twin = _copy(module)
    swaps = []
    for name, home in homes.items():
        part: Foreign = twin.get_submodule(name)
        part.forward = Swap(part, home, Options())
        swaps.append(part.forward)
    return twin, swaps


def _copy(module: Foreign) -> nn.Module:
    """The module in eval mode with its own weights, without anybody's hooks."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):  # as the older kind of weight norm leaves them, which deepcopy refuses
                memo[id(value)] = value
    return copy.deepcopy(module, memo).eval()


def _give_values(linears: Sequence[nn.Module], others: Sequence[nn.Module], generator: torch.Generator) -> None:
    """The same new random values in both, also where an adapter or a parametrisation keeps the weights deeper down."""
    for linear, other in zip(linears, others, strict=True):
        for part, other_part in zip(linear.modules(), other.modules(), strict=True):
            for name, parameter in list(part.named_parameters(recurse=False)):
                values = 0.1 * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
                part._parameters[name] = other_part._parameters[name] = nn.Parameter(values, requires_grad=False)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()


def _compare(expected: Any, found: Any, tolerance: float) -> None:
    if type(expected) is not type(found):
        raise Mismatch(f"its forward returns a {type(expected).__name__}, not a {type(found).__name__}")
    for a, b in zip(_tensors(expected), _tensors(found), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(f"its forward returns {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")
        error = ((a.double() - b.double()).norm() / a.double().norm()).item()
        if not error <= tolerance:
            raise Mismatch(f"a random input came out different, relative error {error:.1e}")


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)]
