"""Parity check: a module and its fast form on copies, in fp32, in evaluation and in training mode.

A model's own forward runs once in each mode at its own input size. Its first block is real, the others are stand-ins that
depend on all their inputs: the run is cheap, records what every block receives, and shows what happens between blocks. Blocks
are then compared on what they received, forward and backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .build import build_of
from .copies import copy_of, on_cpu, random_values, run_isolated, seed_all
from .home import Foreign, Home, Mismatch, ModelInputs, Options, Swap, tokens_of

TOLERANCE = 1e-5  # relative, of outputs in fp32
GRADIENT_TOLERANCE = 1e-4  # sums over tokens cancel
WEAK = 0.03  # every other token's scale: there the norms' eps matters
SAMPLES = 2  # of a first call
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

T = TypeVar("T")

_lock = threading.Lock()
Verdicts: TypeAlias = dict[Any, str]


class Call(NamedTuple):
    """What a block receives."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def key(self) -> tuple[Any, ...]:
        """Return what calls alike have in common: the shapes of tensors, other values, and where they stand."""
        named = [*enumerate(self.args), *sorted(self.kwargs.items())]
        return tuple((name, _kind(value)) for name, value in named if value is not None)

    def tokens(self) -> int:
        return tokens_of(self.args, self.kwargs)


class StandIn:
    """Forward of a block's copy that records its calls and, unless the block is real, mixes its inputs cheaply.

    The result depends on every tensor, on their tokens' order, on the number of other arguments and on the block's index.
    """

    def __init__(self, block: nn.Module, home: Home, index: int, record: Callable[[Call], None], real: bool):
        self.block, self.home, self.index, self.record, self.real = block, home, index, record, real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.record(Call(args, kwargs))
        if self.real:
            return type(self.block).forward(self.block, *args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        streams = [tensor for tensor in tensors if tensor.dim() == 3 and tensor.is_floating_point()]
        x = streams[0]  # [B, T, D]
        factor: Any = 1 + 0.1 * sum(leaf is not None and not isinstance(leaf, Tensor) for leaf in leaves) + 0.01 * self.index
        for tensor in tensors:
            if tensor is not x:
                factor = factor + 0.1 * _projection(tensor, len(x))
        return self.home.stand_in(self.block, [factor * stream + 0.5 * stream.roll(1, 1) for stream in streams])


class ModelRun:
    """A model's own forward, run on a copy; what its blocks received, and whether a fast forward agrees."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, Home]):
        self.model, self.blocks = model, blocks
        self.calls: dict[str, list[Call]] = {name: [] for name in blocks}
        self.keys: dict[str, set[Any]] = {name: set() for name in blocks}
        self.tokens = dict.fromkeys(blocks, 0)  # of the longest sequence that a block received
        self.builds = {name: build_of(model.get_submodule(name)) for name in blocks}
        self.representatives = set(representatives(self.builds))
        self.outputs: list[Any] = []

    def run(self, inputs: ModelInputs) -> str:
        """Run the model's own forward in both modes; return why that cannot be done, or nothing."""
        return _reason(partial(self._run, inputs))

    def _run(self, inputs: ModelInputs) -> None:
        check_weights(self.model)
        self.example = inputs.example(self.model, torch.Generator().manual_seed(0))
        first = next(iter(self.blocks))
        others = {id(p) for name in self.blocks if name != first for p in self.model.get_submodule(name).parameters()}
        own = [p for p in self.model.parameters() if id(p) not in others]
        self.values = random_values(own, torch.Generator().manual_seed(0))
        twin = self._twin(self._record)
        self.outputs = [self._forward(twin, training) for training in (False, True)]

    def judge(self, reasons: dict[nn.Module, str]) -> None:
        """Compare the blocks on what they received, each that stands for others and each that is called otherwise."""
        verdicts: dict[tuple[str, Any], str] = {}
        for name, home in self.blocks.items():
            block, build = self.model.get_submodule(name), self.builds[name]
            if self.calls[name]:
                verdict = why_not_block(block, home, self.calls.pop(name))
                for key in self.keys[name]:
                    verdicts.setdefault((build, key), verdict)
            else:
                verdict = next(filter(None, (verdicts[build, key] for key in self.keys[name])), "")
            if verdict:
                reasons[block] = verdict

    def why_not(self, home: Home, swapped: Sequence[str]) -> str:
        """Return why the model's forward must not be replaced by a family's fast one, or nothing.

        Args:
            home: the family.
            swapped: names of the blocks that are.
        """
        return _reason(partial(self._compare, home, swapped))

    def _compare(self, home: Home, swapped: Sequence[str]) -> None:
        twin: Foreign = self._twin(lambda name, call: None)
        first, inner = next(iter(self.blocks.items()))
        if first in swapped:
            block: Foreign = twin.get_submodule(first)
            block.forward = Swap(block, inner, Options())
        swap = twin.forward = Swap(twin, home, Options())
        if not swap.is_as_found():
            raise Mismatch("the forward of a part of it was replaced before")
        for training, expected in zip((False, True), self.outputs, strict=True):
            _compare(expected, self._forward(twin, training), TOLERANCE)
        if not swap.fast_calls:
            raise Mismatch(swap.idle_reason())

    def _twin(self, record: Callable[[str, Call], None]) -> nn.Module:
        twin = copy_of(self.model, self.values)
        for index, (name, home) in enumerate(self.blocks.items()):
            block: Foreign = twin.get_submodule(name)
            block.forward = StandIn(block, home, index, partial(record, name), real=index == 0)
        return twin

    def _forward(self, twin: nn.Module, training: bool) -> Any:
        seed_all()
        with torch.no_grad():
            return twin.train(training)(*on_cpu(self.example))

    def _record(self, name: str, call: Call) -> None:
        """Keep a call of each kind once, and those of the first, a middle and the last of blocks built alike."""
        key = call.key()
        self.tokens[name] = max(self.tokens[name], call.tokens())
        if key in self.keys[name]:
            return
        alike = [other for other, build in self.builds.items() if build == self.builds[name]]
        if name in self.representatives or not any(key in self.keys[other] for other in alike):
            self.calls[name].append(on_cpu(call))
        self.keys[name].add(key)


def representatives(builds: Mapping[T, Any]) -> list[T]:
    """Return the first, a middle and the last key of each build."""
    groups: dict[Any, list[T]] = {}
    for name, build in builds.items():
        groups.setdefault(build, []).append(name)
    return [group[index] for group in groups.values() for index in sorted({0, len(group) // 2, len(group) - 1})]


def why_not_block(block: nn.Module, home: Home, calls: Sequence[Call]) -> str:
    """Return why a block must not be swapped, from calls that it receives, or nothing."""
    return _reason(partial(_compare_block, block, home, calls))


def example_call(module: nn.Module, home: Home) -> Call:
    """Return a call with the family's own example."""
    with torch.device("cpu"):
        return Call(home.example(module, torch.Generator().manual_seed(0)), {})


def check_first_call(
    verdicts: Verdicts, is_representative: bool, swap: Swap, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Check a block on what it receives; None where that cannot be told now: under a transform, or while it is captured.

    Args:
        verdicts: of blocks swapped together, by how they are built and called; written.
        is_representative: False takes the verdict on a block built and called alike, where there is one.
        swap: the block's.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
    """
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    if any(map(_is_symbolic, [*tensors, *swap.module.parameters()])):
        return None
    if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
        return None
    call = Call(tuple(args), dict(kwargs))
    with _lock:
        key = build_of(swap.module), call.key()
        if is_representative or key not in verdicts:
            verdict = why_not_block(swap.module, swap.home, [_few_samples(call)])
            verdicts.setdefault(key, verdict)
            return verdict
        return verdicts[key]


def _is_symbolic(tensor: Tensor) -> bool:
    """Return True for tensors whose numbers are not their own: fake ones, and those of function transforms."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return (not plain and hasattr(tensor, "fake_mode")) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _few_samples(call: Call) -> Call:
    """Return a call's first samples, as views, if its tensors agree on how many there are."""
    leaves = [leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, Tensor)]
    B = len(leaves[0]) if leaves and leaves[0].dim() == 3 else 0

    def few(value: Any) -> Any:
        return value[:SAMPLES] if isinstance(value, Tensor) and value.dim() and len(value) == B else value

    return Call(tuple(map(few, call.args)), {name: few(value) for name, value in call.kwargs.items()})


def in_one_line(error: Exception) -> str:
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


def _reason(check: Callable[[], None]) -> str:
    """Return why a check failed, or nothing."""
    try:
        run_isolated(check)
    except Mismatch as mismatch:
        return str(mismatch)
    except Exception as error:  # anything may come out of somebody else's code
        return f"a random input raised {in_one_line(error)}"
    return ""


def check_weights(module: nn.Module) -> None:
    """Raise ``Mismatch`` if a module's weights are not there, or not of a dtype that the ops have."""
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if weight is None or weight.is_meta or weight.dtype not in DTYPES:
        got = "not there" if weight is None else "on the meta device" if weight.is_meta else weight.dtype
        raise Mismatch(f"its weights are {got}, expected fp32, bf16 or fp16")


def _compare_block(block: nn.Module, home: Home, calls: Sequence[Call]) -> None:
    check_weights(block)
    generator = torch.Generator().manual_seed(0)
    values = random_values(list(block.parameters()), generator)
    original: Foreign = copy_of(block, values)
    fast: Foreign = copy_of(block, values)
    swap = Swap(fast, home, Options())
    if not swap.is_as_found() or "forward" in vars(original):
        raise Mismatch("the forward of a part of it was replaced before")
    fast.forward = swap
    for call in calls:
        call = _strengthened(on_cpu(call))
        for training in (False, True):
            expected, gradients = _forward_backward(original.train(training), call)
            found, fast_gradients = _forward_backward(fast.train(training), call)
            if swap.original_calls:
                raise Mismatch(swap.idle_reason())
            _compare(expected, found, TOLERANCE)
            for one, other in zip(gradients, fast_gradients, strict=True):
                _compare_tensors(one, other, GRADIENT_TOLERANCE, "gradient")


def _forward_backward(block: nn.Module, call: Call) -> tuple[Any, list[Tensor]]:
    """Return a block's output, and in training mode the gradients of its inputs."""
    call = on_cpu(call)
    inputs = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    seed_all()
    if not block.training:
        with torch.no_grad():
            return block(*call.args, **call.kwargs), []
    leaves = [tensor.requires_grad_() for tensor in inputs]
    # Of views: a block may write into what it receives.
    args, kwargs = _map_tensors(lambda tensor: tensor.view_as(tensor), call)
    output = block(*args, **kwargs)
    ends = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(end.shape, generator=generator, dtype=torch.float32, device="cpu").to(end.dtype) for end in ends]
    gradients = torch.autograd.grad(ends, leaves, upstream, allow_unused=True) if ends else [None] * len(leaves)
    detached = _map_tensors(Tensor.detach, output)
    return detached, [
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


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


def _projection(tensor: Tensor, B: int) -> Tensor | float:
    """Return a number for each sample [B, 1, 1], or for all, that depends on every element."""
    rows = tensor.detach().float() if not tensor.is_complex() else torch.view_as_real(tensor).float()
    if rows.dim() and len(rows) == B:
        rows = rows.reshape(B, -1)
        return torch.sin(rows @ torch.arange(rows.shape[1], dtype=torch.float32).cos() / max(rows.shape[1], 1) ** 0.5)[
            :, None, None
        ]
    rows = rows.flatten()
    return torch.sin(rows @ torch.arange(len(rows), dtype=torch.float32).cos() / max(len(rows), 1) ** 0.5)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]) if value.dim() > 1 else value.dim()
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


def _compare(expected: Any, found: Any, tolerance: float) -> None:
    if type(expected) is not type(found):
        raise Mismatch(f"its forward returns a {type(expected).__name__}, not a {type(found).__name__}")
    for a, b in zip(_tensors(expected), _tensors(found), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(f"its forward returns {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")
        _compare_tensors(a, b, tolerance, "random input")


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
