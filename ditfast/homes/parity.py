"""Parity check: a module and its fast form on copies, in fp32, in evaluation and in training mode.

A model's own forward runs once in each mode at its own input size. Its first block is real, the others are stand-ins that
depend on all their inputs: the run is cheap, records what every block receives, and shows what happens between blocks. Blocks
are then compared on what they received, forward and backward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .build import build_of
from .calls import NO_LENGTHS, Lengths
from .comparison import (
    RANDOM,
    REPLACED,
    STATE,
    Call,
    cast_inputs,
    compare_kinds,
    compare_outputs,
    to_device,
    weight_of,
    why_not_block,
)
from .copies import cast_like, check_device, copy_of, in_fp32, random_values, release, rng_states, seed_all
from .home import Foreign, Home, Mismatch, ModelInputs, Options, Swap

SAMPLES = 2  # of a first call

T = TypeVar("T")

_lock = threading.Lock()
Verdicts: TypeAlias = dict[Any, str]


class StandIn:
    """Forward of a block's copy that records its calls and, unless the block is real, mixes its inputs cheaply.

    The result depends on every tensor, on their scale and their tokens' order, on the number of other arguments and on the
    block's index.
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
        mixed = [(factor * stream + stream.roll(1, 1).tanh()).to(stream.dtype) for stream in streams]
        return self.home.stand_in(self.block, mixed)


class ModelRun:
    """A model's own forward, run on a copy; what its blocks received, and whether a fast forward agrees."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, Home]):
        self.model, self.blocks = model, blocks
        self.calls: dict[str, list[Call]] = {name: [] for name in blocks}
        self.keys: dict[str, set[Any]] = {name: set() for name in blocks}
        self.lengths: dict[str, Lengths] = {}  # of the sequences that a block received, if it was called
        self.builds = {name: build_of(model.get_submodule(name)) for name in blocks}
        self.representatives = set(representatives(self.builds))
        self.outputs: list[Any] = []
        self.other_output: Any = None  # of the other example, if it takes that
        self.own_dtype_output: Any = None  # in the dtype of the weights, if it takes inputs in that
        self.states: list[list[bytes]] = []  # of random number generators, after each

    def run(self, inputs: ModelInputs) -> None:
        """Run the model's own forward in both modes, which may raise anything."""
        device = check_device(weight_of(self.model))
        self.example = to_device(inputs.example(self.model, torch.Generator().manual_seed(0)), device)
        self.other_example = inputs.other_example(self.example)
        twin = self._twin(self._record)
        try:
            for training in (False, True):
                self.outputs.append(self._forward(twin, training, self.example))
                self.states.append(rng_states())
            self.other_output = self._other_output(twin)
            self.own_dtype_output = self._own_dtype_output(twin)
        finally:
            release(twin)
        self.build = build_of(twin)

    def judge(self, reasons: dict[nn.Module, str]) -> None:
        """Compare the blocks on what they received, each that stands for others and each that is called otherwise.

        What was refuted is refuted for all built and called alike; what held is compared again on one sample.
        """
        verdicts: dict[tuple[str, Any], str] = {}
        for name, home in self.blocks.items():
            block, build = self.model.get_submodule(name), self.builds[name]
            verdict = next(filter(None, (verdicts.get((build, key)) for key in self.keys[name])), "")
            calls = self.calls.pop(name)
            if calls and not verdict:
                calls = [call.first_samples(1) if (build, call.key()) in verdicts else call for call in calls]
                verdict = why_not_block(block, home, calls)
                verdicts.update(((build, key), verdict) for key in self.keys[name])
            if verdict:
                reasons[block] = verdict

    def compare(self, home: Home, swapped: Sequence[str]) -> None:
        """Raise unless a family's fast forward agrees with the model's own, some of whose blocks are swapped."""
        twin: Foreign = self._twin(lambda name, call: None)
        first, inner = next(iter(self.blocks.items()))
        if first in swapped:
            block: Foreign = twin.get_submodule(first)
            block.forward = Swap(block, inner, Options())
        swap = twin.forward = Swap(twin, home, Options())
        try:
            if not swap.is_as_found():
                raise Mismatch(REPLACED)
            for training, expected, states in zip((False, True), self.outputs, self.states, strict=True):
                compare_outputs(expected, self._forward(twin, training, self.example))
                if rng_states() != states:
                    raise Mismatch(RANDOM)
            if not swap.fast_calls:
                raise Mismatch(swap.idle_reason())
            other, in_own_dtype = self._other_output(twin), self._own_dtype_output(twin)
            if self.other_output is not None:
                compare_outputs(self.other_output, other)
            if self.own_dtype_output is not None:
                compare_kinds(self.own_dtype_output, in_own_dtype)
        finally:
            release(twin)
        if build_of(twin) != self.build:
            raise Mismatch(STATE)

    def _twin(self, record: Callable[[str, Call], None]) -> nn.Module:
        first = next(iter(self.blocks))
        others = {id(p) for name in self.blocks if name != first for p in self.model.get_submodule(name).parameters()}
        twin = copy_of(self.model, random_values(p for p in self.model.parameters() if id(p) not in others))
        for index, (name, home) in enumerate(self.blocks.items()):
            block: Foreign = twin.get_submodule(name)
            block.forward = StandIn(block, home, index, partial(record, name), real=index == 0)
        return twin

    def _forward(self, twin: nn.Module, training: bool, example: Any) -> Any:
        seed_all()
        with torch.no_grad():
            return twin.train(training)(*in_fp32(example))

    def _other_output(self, twin: nn.Module) -> Any:
        """Return a copy's output for the other example; None if it does not take that."""
        with contextlib.suppress(Exception):
            return None if self.other_example is None else self._forward(twin, False, self.other_example)
        return None

    def _own_dtype_output(self, twin: nn.Module) -> Any:
        """Return a copy's output in the dtype of the weights; None if that is fp32, or it does not take inputs in it."""
        if not cast_like(twin, self.model):
            return None
        with contextlib.suppress(Exception), torch.no_grad():
            return twin.eval()(*cast_inputs(self.example, self.model))
        return None

    def _record(self, name: str, call: Call) -> None:
        """Keep a call of each kind once, and those of the first, a middle and the last of blocks built alike."""
        key = call.key()
        self.lengths[name] = self.lengths.get(name, NO_LENGTHS).including(call.tokens())
        if key in self.keys[name]:
            return
        alike = [other for other, build in self.builds.items() if build == self.builds[name]]
        if name in self.representatives or not any(key in self.keys[other] for other in alike):
            self.calls[name].append(in_fp32(call))
        self.keys[name].add(key)


def representatives(builds: Mapping[T, Any]) -> list[T]:
    """Return the first, a middle and the last key of each build."""
    groups: dict[Any, list[T]] = {}
    for name, build in builds.items():
        groups.setdefault(build, []).append(name)
    return [group[index] for group in groups.values() for index in sorted({0, len(group) // 2, len(group) - 1})]


def check_first_call(
    verdicts: Verdicts, is_representative: bool, swap: Swap, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Check a block on what it receives; None where that cannot be told now: under a transform, or while it is captured.

    Args:
        verdicts: of blocks swapped together, by how they are built and called; written.
        is_representative: False takes the verdict on a block built and called alike, where there is one.
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
            verdict = why_not_block(swap.module, swap.home, [call.first_samples(SAMPLES)])
            verdicts.setdefault(key, verdict)
            return verdict
        return verdicts[key]


def _is_symbolic(tensor: Tensor) -> bool:
    """Return True for tensors whose numbers are not their own: fake ones, and those of function transforms."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return (not plain and hasattr(tensor, "fake_mode")) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _projection(tensor: Tensor, B: int) -> Tensor:
    """Return a number for each sample [B, 1, 1], or for all, that depends on every element."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    is_per_sample = tensor.dim() > 0 and len(tensor) == B
    rows = numbers.detach().float().reshape(B if is_per_sample else 1, -1)  # [B or 1, N]
    N = rows.shape[1]
    weights = torch.arange(N, dtype=torch.float32, device=rows.device).cos()
    return torch.sin(rows @ weights / max(N, 1) ** 0.5)[:, None, None]  # [B or 1, 1, 1]
