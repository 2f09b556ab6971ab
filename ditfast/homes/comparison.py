"""Comparison of a block with its fast form on copies, in fp32, forward and backward, in evaluation and in training mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..argument_checks import DTYPES
from .build import build_of
from .calls import tokens_of
from .copies import cast_like, check_device, copy_of, in_fp32, random_values, release, rng_states, run_isolated, seed_all
from .home import Foreign, Home, Mismatch, Options, Swap

TOLERANCE = 1e-5  # relative, of outputs in fp32
GRADIENT_TOLERANCE = 1e-4  # sums over tokens cancel
WEAK = 0.03  # every other token's scale: there the norms' eps matters
RANDOM = "it draws random numbers that its fast forward does not"
REPLACED = "the forward of a part of it was replaced before"
WRITES = "it writes into its arguments, which its fast forward does not"
STATE = "it keeps something that its fast forward does not"


class Call(NamedTuple):
    """Arguments that a block receives."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def key(self) -> tuple[Any, ...]:
        """Return what calls alike have in common: the shapes of tensors, other values, and where they stand."""
        named = [*enumerate(self.args), *sorted(self.kwargs.items())]
        return tuple((name, _kind(value)) for name, value in named if value is not None)

    def tokens(self) -> int:
        return tokens_of(self.args, self.kwargs)

    def first_samples(self, samples: int) -> Call:
        """Return the first samples, as views, if the tensors agree on how many there are."""
        leaves = [leaf for leaf in (*self.args, *self.kwargs.values()) if isinstance(leaf, Tensor)]
        B = len(leaves[0]) if leaves and leaves[0].dim() == 3 else 0

        def few(value: Any) -> Any:
            return value[:samples] if isinstance(value, Tensor) and value.dim() and len(value) == B else value

        return Call(tuple(map(few, self.args)), {name: few(value) for name, value in self.kwargs.items()})


def example_call(module: nn.Module, home: Home) -> Call:
    """Return a call with the family's own example."""
    with torch.device("cpu"):
        example = home.example(module, torch.Generator().manual_seed(0))
    return Call(to_device(example, check_device(weight_of(module))), {})


def why_not_block(block: nn.Module, home: Home, calls: Sequence[Call]) -> str:
    """Return why a block must not be swapped, from calls that it receives, or nothing."""
    return reason_of(partial(_compare_block, block, home, calls))


def reason_of(check: Callable[[], None]) -> str:
    """Return why a check failed, or nothing."""
    try:
        run_isolated(check)
    except Mismatch as mismatch:
        return str(mismatch)
    except Exception as error:  # anything may come out of somebody else's code
        return f"a random input raised {in_one_line(error)}"
    return ""


def in_one_line(error: Exception) -> str:
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


def weight_of(module: nn.Module) -> Tensor:
    """Return a module's first weight.

    Raises:
        Mismatch: it is not there, or not of a dtype that the ops have.
    """
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if weight is None or weight.is_meta or weight.dtype not in DTYPES:
        got = "not there" if weight is None else "on the meta device" if weight.is_meta else weight.dtype
        raise Mismatch(f"its weights are {got}, expected fp32, bf16 or fp16")
    return weight


def to_device(tree: Any, device: torch.device) -> Any:
    return _map_tensors(lambda tensor: tensor.to(device), tree)


def cast_inputs(tree: Any, module: nn.Module) -> Any:
    """Return copies of arguments, floating-point tensors in the dtype of a module's weights."""
    dtype = weight_of(module).dtype
    return _map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, in_fp32(tree))


def compare_kinds(expected: Any, found: Any) -> None:
    """Raise ``Mismatch`` unless two outputs have the same type, shapes and dtypes."""
    if type(expected) is not type(found):
        raise Mismatch(f"its forward returns a {type(expected).__name__}, not a {type(found).__name__}")
    for a, b in zip(_tensors(expected), _tensors(found), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(f"its forward returns {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")


def compare_outputs(expected: Any, found: Any) -> None:
    """Raise ``Mismatch`` unless two outputs agree."""
    compare_kinds(expected, found)
    for a, b in zip(_tensors(expected), _tensors(found), strict=True):
        _compare_tensors(a, b, TOLERANCE, "random input")


def _compare_block(block: nn.Module, home: Home, calls: Sequence[Call]) -> None:
    weight_of(block)
    values = random_values(block.parameters())
    original: Foreign = copy_of(block, values)
    fast: Foreign = copy_of(block, values)
    if "forward" in vars(original):
        raise Mismatch(REPLACED)
    swap = fast.forward = Swap(fast, home, Options())
    try:
        if not swap.is_as_found():
            raise Mismatch(REPLACED)
        for call in calls:
            _compare_calls(original, fast, swap, _strengthened(in_fp32(call)))
        if build_of(original) != build_of(fast):
            raise Mismatch(STATE)
        cast = [cast_like(copy, block) for copy in (original, fast)]  # which share their parameters
        if any(cast):
            for call in calls:
                _compare_dtypes(original.eval(), fast.eval(), cast_inputs(call.first_samples(1), block))
    finally:
        release(fast)


@torch.no_grad()
def _compare_dtypes(original: nn.Module, fast: nn.Module, call: Call) -> None:
    """Raise ``Mismatch`` if the outputs' dtypes differ where the weights are not in fp32: a block may keep its stream in it."""
    try:
        expected = original(*call.args, **call.kwargs)
    except Exception:  # it does not take inputs in its weights' dtype, and is not given any
        return
    compare_kinds(expected, fast(*call.args, **call.kwargs))


def _compare_calls(original: nn.Module, fast: nn.Module, swap: Swap, call: Call) -> None:
    for training in (False, True):
        expected, gradients, written = _forward_backward(original.train(training), call)
        states = rng_states()
        found, fast_gradients, fast_written = _forward_backward(fast.train(training), call)
        if swap.original_calls:
            raise Mismatch(swap.idle_reason())
        if rng_states() != states:
            raise Mismatch(RANDOM)
        compare_outputs(expected, found)
        for a, b in zip(tree_leaves(written), tree_leaves(fast_written), strict=False):
            if isinstance(a, Tensor) and not torch.equal(a.nan_to_num(), b.nan_to_num()):
                raise Mismatch(WRITES)
        for one, other in zip(gradients, fast_gradients, strict=True):
            _compare_tensors(one, other, GRADIENT_TOLERANCE, "gradient")


def _forward_backward(block: nn.Module, call: Call) -> tuple[Any, list[Tensor], Call]:
    """Return a block's output, in training mode the gradients of its inputs, and the inputs as it leaves them."""
    call = in_fp32(call)
    inputs = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    seed_all()
    if not block.training:
        with torch.no_grad():
            return block(*call.args, **call.kwargs), [], call
    leaves = [tensor.requires_grad_() for tensor in inputs]
    received = _map_tensors(Tensor.clone, call)  # a block may write into it, and must not into leaves
    output = block(*received.args, **received.kwargs)
    ends = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    upstream = [_upstream(end) for end in ends]
    gradients = torch.autograd.grad(ends, leaves, upstream, allow_unused=True) if ends else [None] * len(leaves)
    complete = [
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    return _map_tensors(Tensor.detach, output), complete, _map_tensors(Tensor.detach, received)


def _upstream(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu").to(output)


def _strengthened(call: Call) -> Call:
    """Return arguments as strong as a trained model's: the root mean square at least 1, every other token of the first weak."""

    def scale(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        size = tensor.square().mean().sqrt()
        return tensor / size if 0 < size < 1 else tensor

    call = _map_tensors(scale, call)
    stream = next((leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)), None)
    if stream is not None and stream.dim() == 3 and stream.is_floating_point():
        stream[:, 1::2] *= WEAK
    return call


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]) if value.dim() > 1 else value.dim()
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


def _compare_tensors(expected: Tensor, found: Tensor, tolerance: float, name: str) -> None:
    difference, size = (expected.double() - found.double()).norm().item(), expected.double().norm().item()
    if not difference <= tolerance * size:
        error = difference / size if size else float("inf")
        raise Mismatch(f"a {name} came out different, relative error {error:.1e}")


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)]
