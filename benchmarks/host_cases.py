"""Cases of host.py: forwards, training steps and ops, on kernels that do nothing where there is no GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ditfast
from ditfast import ops
from ditfast.dispatch.plan import forget_plans

from .kernel_cases import OPS, Sizes, arguments, as_tuple
from .rivals import Case, Run

FORWARD, STEP, OP, OP_GRAD, OP_BACKWARD = "forward", "step", "op", "op, gradients wanted", "op with its backward"
EAGER, OURS, LAYER_NORM = "eager", "ditfast", "aten.layer_norm"
CALLED = {f"{OURS}, 1 called": 1, f"{OURS}, 28 called": 28}  # linears
BASELINES = ("diffusers", "compile")
OP_CALLS = 20  # in a sample
ARCH = 90  # that the simulator compiles for


class Unusable(Exception):
    """There is nothing here to launch kernels on."""


# ------------------------------------------------------------------------------------------------ launches
def nothing(*_: object) -> None:
    """Take the place of what has nothing to do here."""


@contextlib.contextmanager
def launches_without_kernels(enqueue: Callable[..., None] = nothing) -> Iterator[None]:
    """Compile kernels for the simulator, and replace the call that enqueues a compiled one, and nothing else.

    Args:
        enqueue: called in its place, with the launcher, the grid, and all that the launch would pass to the kernel.

    Raises:
        Unusable: there is no simulator here.
    """
    ptxsim, launcher = _simulator()
    launch = launcher.__call__
    ptxsim.install(ARCH)
    launcher.__call__ = enqueue
    forget_plans()  # which hold kernels of other devices
    try:
        yield
    finally:
        launcher.__call__ = launch
        ptxsim.uninstall()
        forget_plans()


def _simulator() -> tuple[Any, Any]:
    """Return tests/ptxsim of the clone, and the class whose call launches a compiled kernel there."""
    tests = Path(__file__).resolve().parents[1] / "tests"
    if importlib.util.find_spec("triton") is None:
        raise Unusable("triton: got none, expected it installed: pip install triton (Linux)")
    if not (tests / "ptxsim").exists():
        raise Unusable("device: got cpu, expected cuda, or a clone of ditfast, whose tests/ptxsim does without a GPU")
    if str(tests) not in sys.path:
        sys.path.append(str(tests))
    try:
        importlib.import_module("ptxsim.library").build()
    except (OSError, RuntimeError) as error:  # no compiler, or one that is too old
        line = str(error).partition("\n")[0]
        raise Unusable(f"device: got cpu, expected cuda, or g++ (or CXX) to build the simulator with: {line}") from error
    return importlib.import_module("ptxsim"), importlib.import_module("ptxsim.driver").SimLauncher


# ------------------------------------------------------------------------------------------------ cases
@dataclass(frozen=True)
class Timed:
    """Something to time: a kind of call, and of what."""

    kind: str
    name: str
    call: Callable[[], object]
    before: Callable[[], None] = nothing  # in front of a sample, untimed

    @property
    def calls(self) -> int:
        """In a sample."""
        return 1 if self.kind in (FORWARD, STEP) else OP_CALLS

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """Gradients and backend of the call."""
        backend = "torch" if self.name in (EAGER, LAYER_NORM, *BASELINES) else "triton"
        with torch.inference_mode(self.kind in (FORWARD, OP)), ditfast.backend(backend):
            yield


def makers(case: Case, baselines: Sequence[str]) -> Iterator[tuple[str, str, Callable[[], Timed]]]:
    """Yield kinds, names and how to make what is to be timed; what a budget leaves out comes last."""
    model = functools.cache(
        lambda name: with_called_linears(case.rival(OURS, {}), CALLED[name]) if name in CALLED else case.rival(name, {})
    )
    inputs = case.inputs()
    kinds: dict[str, Callable[[str, Run, tuple[Tensor, ...]], Timed]] = {FORWARD: _forward, STEP: _step}
    sizes, device, dtype = Sizes(case.config, case.batch), case.device, case.dtype

    def of_models(names: Sequence[str]) -> Iterator[tuple[str, str, Callable[[], Timed]]]:
        for name in names:
            for kind, make in kinds.items():
                yield kind, name, lambda name=name, make=make: make(name, model(name), inputs)  # type: ignore[misc]

    yield from of_models((OURS, EAGER))
    for kind in (OP, OP_GRAD, OP_BACKWARD):
        for name in (LAYER_NORM, *OPS):
            if kind == OP or name == LAYER_NORM or OPS[name].differentiable:
                yield kind, name, functools.partial(_op, kind, name, sizes, device, dtype)
    yield from of_models((*CALLED, *baselines))


class CalledLinear(nn.Module):
    """A linear that has to be called, as those of LoRA have."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def with_called_linears(model: Any, count: int) -> Run:
    """Return a ``ditfast.DiT`` in which so many linears of its blocks, from the first block on, have to be called."""
    linears = [
        (module, name)
        for block in model.blocks
        for module, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2")))
        for name in names
    ]
    for module, name in linears[:count]:
        setattr(module, name, CalledLinear(getattr(module, name)))
    return model


def _forward(name: str, run: Run, inputs: tuple[Tensor, ...]) -> Timed:
    return Timed(FORWARD, name, lambda: run(*inputs))


def _step(name: str, run: Run, inputs: tuple[Tensor, ...]) -> Timed:
    def step() -> None:
        run(*inputs).square().mean().backward()

    with torch.enable_grad():
        trained = list(_leaves(run(*inputs).sum()))

    def forget_gradients() -> None:
        for parameter in trained:
            parameter.grad = None

    return Timed(STEP, name, step, forget_gradients)


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """Yield what the output is differentiated by."""
    left, seen = [output.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        left += [child for child, _ in node.next_functions]


def _op(kind: str, name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Timed:
    of_op = "layer_norm_modulate" if name == LAYER_NORM else name
    tensors = arguments(of_op, sizes, dtype, device, backward=kind != OP)
    call: Callable[[], Any]
    if name == LAYER_NORM:
        tensors = {"x": tensors["x"]}
        call = functools.partial(F.layer_norm, tensors["x"], (sizes.D,))
    elif name == "grouped_linear":  # as the model calls it: with each layer's own weights
        call = functools.partial(
            ops.grouped_linear, tensors["x"], list(tensors["weights"].unbind()), list(tensors["biases"].unbind())
        )
    else:
        call = functools.partial(OPS[name].call, sizes, **tensors)
    if kind != OP_BACKWARD:
        return Timed(kind, name, call)
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]

    def differentiate() -> None:
        sums = [output.sum() for output in as_tuple(call())]
        torch.autograd.grad(sum(sums[1:], sums[0]), trained)

    return Timed(kind, name, differentiate)
