"""Copies of modules for the parity check: fp32 on the CPU, random weights, no hooks; the live module is only read."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..ops.dispatch import backend
from .home import NOTE, Foreign, Swap

HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
BIAS_STD = 0.3  # as strong as a trained model's shifts and gates

T = TypeVar("T")


def random_values(parameters: Collection[nn.Parameter], generator: torch.Generator) -> dict[int, Tensor]:
    """Return new fp32 parameters by the id of the old: products keep unit variance, so that attention and gates matter."""
    values: dict[int, Tensor] = {}
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            continue
        std = (
            BIAS_STD
            if parameter.dim() < 2
            else parameter[0].numel() ** -0.5
            if parameter.dim() > 3
            else parameter.shape[-1] ** -0.5
        )
        value = torch.empty_like(parameter, dtype=torch.float32, device="cpu", requires_grad=False).normal_(
            0, std, generator=generator
        )
        values[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return values


def copy_of(module: nn.Module, values: Mapping[int, Tensor], convert: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Return a copy without hooks or swaps.

    Args:
        module: the module.
        values: its copy's parameters, by the id of the module's; the others are shared.
        convert: makes the copy's buffers, and tensors among its attributes; on the CPU and in fp32 unless given.
    """
    convert = convert or on_cpu
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo.update(values)
    for part in module.modules():
        for buffer in part._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = convert(buffer)
        for name, value in vars(part).items():
            if name.endswith(HOOKS):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):  # as the older kind of weight norm leaves them, which deepcopy refuses
                memo[id(value)] = convert(value)
            elif isinstance(value, Swap):
                memo[id(value)] = None
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        own: Foreign = vars(part)
        own.pop(NOTE, None)
        if own.get("forward", part) is None:
            del own["forward"]
        if isinstance(own["_modules"].get("_orig_mod"), nn.Module):  # compiled; the copy is not
            own["forward"] = own["_modules"]["_orig_mod"].__call__
    return twin


def on_cpu(value: T) -> T:
    """Return a copy of a tensor, or of the tensors in a tree of arguments, on the CPU, in fp32 if it has fractions."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to("cpu", torch.float32 if leaf.is_floating_point() else leaf.dtype, copy=True)

    return tree_map(convert, value)


def run_isolated(function: Callable[[], T]) -> T:
    """Call a function on a thread of its own, on the torch backend, and leave the random number generators as they were.

    Grad mode, autocast, hooks on saved tensors, function transforms and default devices are the thread's: new ones.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with backend("torch"), _kept_rng():
                results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="ditfast-parity-check")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    states = [generator.get_state() for generator in generators]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (which foreign code draws from)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def seed_all() -> None:
    """Seed what a forward on the CPU draws from; ``torch.manual_seed`` would seed every GPU too."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
