"""How an op picks its implementation, and how its Triton half is registered with torch.

An op has two halves. ``torch_*`` is plain torch: autograd and torch.compile see through it. The registered op
``ditfast::name`` always launches Triton kernels, forward and backward, so a backward runs where its forward ran, on whatever
thread autograd calls it. The public function chooses between them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..problem import Problem
from .decisions import decide, use_tiles
from .routes import Choice, has_triton, library_attention, why_not

BACKENDS = ("torch", "triton")
NOT_CUDA = Choice("torch", "only CUDA tensors take Triton unless ditfast.backend forces it")


class Forced(NamedTuple):
    """What context managers force."""

    backend: str | None = None
    attention: str | None = None
    trial: tuple[str, str] | None = None  # an op and its route, for who measures them


_library = torch.library.Library("ditfast", "DEF")
_forced: ContextVar[Forced] = ContextVar("ditfast.forced", default=Forced())  # noqa: B039 (a NamedTuple cannot change)
# torch.compile cannot read a ContextVar. It can guard on a global, by identity: so one object stands for each choice, and a
# compiled graph follows what was forced last and is still in force, whichever thread did.
_NOTHING = Forced()
_one_of_each = {_NOTHING: _NOTHING}
_in_force: list[Force] = []
_latest = _NOTHING
_watching: list[Callable[[Problem], None]] = []


class Force:
    """A context manager that sets ``Forced``, in this thread; may be entered again once it was left."""

    def __init__(self, choice: Forced):
        self.choice = _one_of_each.setdefault(choice, choice)

    def __enter__(self) -> None:
        self.token = _forced.set(self.choice)
        _in_force.append(self)
        self._update()

    def __exit__(self, *_: object) -> None:
        _forced.reset(self.token)
        _in_force.remove(self)
        self._update()

    @staticmethod
    def _update() -> None:
        global _latest
        _latest = _in_force[-1].choice if _in_force else _NOTHING


def backend(name: str) -> Force:
    """Forces every op inside the ``with`` block, in this thread, onto plain torch or onto the Triton kernels.

    Without it CPU tensors take torch, and CUDA tensors what is fastest: as ``ditfast tune`` measured it, else as predicted,
    else Triton for all but plain products; ``ditfast doctor`` shows which, and why. ``"triton"`` on CPU tensors runs in
    Triton's interpreter (TRITON_INTERPRET=1 before the first import of ditfast). A backward runs on the backend of its
    forward; the recomputation of ``torch.utils.checkpoint`` does if it is given ``context_fn=ditfast.checkpoint_contexts``.

    Raises:
        ValueError: the name is neither ``"torch"`` nor ``"triton"``.
    """
    return force("backend", name, BACKENDS)


def force(field: str, name: str, allowed: tuple[str, ...]) -> Force:
    """Sets a field of ``Forced`` inside the ``with`` block, in this thread."""
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"{field}: got {name!r}, expected one of {', '.join(allowed)}")
    fields: dict[str, Any] = {field: name}
    return Force(_forced.get()._replace(**fields))


def on_trial(op: str, route: str) -> Force:
    """Sends one op down a route inside the ``with`` block, in this thread, whatever is known of it; for who measures it."""
    return Force(_forced.get()._replace(trial=(op, route)))


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """``context_fn`` for ``torch.utils.checkpoint``: the recomputation makes the choices of the forward.

    It runs in the backward, perhaps on another thread, where the forward's ``with ditfast.backend(...)`` does not reach.
    """
    return contextlib.nullcontext(), Force(_forced.get())


def forced() -> Forced:
    return _latest if torch.compiler.is_compiling() else _forced.get()


@functools.cache
def kernels() -> ModuleType:
    """``ditfast.kernels``, imported at the first launch: triton is slow to import, and absent on macOS and Windows."""
    if not has_triton():
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed: pip install triton (Linux)")
    import ditfast.kernels

    return ditfast.kernels


def choose(device: torch.device, problem: Problem) -> Choice:
    """The route that an op takes for tensors on a device, and why: forced, measured, predicted or the default.

    Raises:
        RuntimeError: attention is forced onto an engine that cannot run; the message says why, and what to do.
    """
    choice = forced()
    if choice.trial is not None and choice.trial[0] == problem.op:
        return Choice(choice.trial[1], "on trial")
    if problem.op == "attention":
        if choice.attention is not None:
            check_possible(choice.attention, device, problem)
            return Choice(choice.attention, "forced by ditfast.attention_engine")
        if choice.backend == "triton":
            check_possible("triton", device, problem)
            return Choice("triton", "forced by ditfast.backend")
        if choice.backend == "torch" or device.type != "cuda":
            return library_attention(device, problem)
    elif choice.backend is not None:
        return Choice(choice.backend, "forced by ditfast.backend")
    elif device.type != "cuda":
        return NOT_CUDA
    if torch.compiler.is_compiling():
        return Choice(_decided(device, *problem.bucket()), "as when it was traced")
    return decide(device, problem)


def _decided(device: torch.device, op: str, dtype: torch.dtype, rows: int, sizes: tuple[int, ...], training: bool) -> str:
    """For a compiled graph, which holds what was known when it was traced."""
    return decide(device, Problem(op, dtype, rows, sizes, training)).route


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func``, or forward-mode differentiation, is under way; kernels know neither."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, which would import all of torch.compile for it.
vars(_decided)["_dynamo_marked_constant"] = vars(is_transformed)["_dynamo_marked_constant"] = True


def computes_now() -> bool:
    """Return whether ops compute at once, on numbers that can be read: nothing traces, transforms or fakes them."""
    tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return not (tracing or torch._C._len_torch_dispatch_stack() or is_transformed())


def untransformed(op: str, route: str, is_forced: bool = False) -> str:
    """Return the route, or the one in plain torch where a transform is under way and nothing forces another.

    Raises:
        RuntimeError: kernels are forced that no transform goes through.
    """
    in_torch = "sdpa" if op == "attention" else "torch"
    if route == in_torch or not is_transformed():
        return route
    choice = forced()
    if not (is_forced or choice.trial or choice.backend == "triton" or (op == "attention" and choice.attention)):
        return in_torch
    raise RuntimeError(
        f"{op}: forward-mode derivatives and torch.func's transforms do not go through its kernels ({route!r}); "
        "run it under ditfast.backend('torch')"
    )


def route(x: Tensor, op: str, rows: int, sizes: tuple[int, ...], training: bool = False) -> str:
    """The one that an op takes for x and this problem."""
    problem = Problem(op, x.dtype, rows, sizes, training)
    for watch in _watching:
        watch(problem)
    return untransformed(op, choose(x.device, problem).route)


@contextlib.contextmanager
def watching(watch: Callable[[Problem], None]) -> Iterator[None]:
    """Calls inside the ``with`` block are told of each problem that an op is given."""
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.remove(watch)


def check_possible(engine: str, device: torch.device, problem: Problem) -> None:
    why = why_not(engine, device, problem)
    if why:
        raise RuntimeError(f"attention was forced onto {engine!r}, but {why}: ditfast.attention_engine('sdpa') takes any input")


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a backward may follow. Always under ``torch.jit.trace``, whose check compares graphs of either mode."""
    if torch._C._get_tracing_state() is not None:  # torch.jit.is_tracing(), in one call
        return True
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, as torch casts the arguments of F.linear; the op behind does not see autocast.

    What is no tensor stays as it is, for the op's checks to refuse.
    """
    dtype = autocast_dtype(tensors[0].device) if isinstance(tensors[0], Tensor) else None
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if _is_cast(t) else t for t in tensors)


def _is_cast(tensor: Tensor) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """None where autocast is off."""
    kind = "cpu" if device.type == "meta" else device.type  # torch has no autocast of tensors without data
    available = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)  # which takes a while to ask
    return torch.get_autocast_dtype(kind) if available and torch.is_autocast_enabled(kind) else None


def define_op(
    schema: str,
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    run: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers ``ditfast::name``, which calls the launcher of that name in ``ditfast.kernels``.

    Args:
        schema: as for ``torch.library.define``; the first tensor argument says where to run.
        fake: the same call on tensors without data, for torch.compile.
        save: ``save(ctx, inputs, output)`` keeps what the backward needs. Outputs that nothing used have no gradient
            there, where torch would make up zeros.
        backward: ``backward(ctx, *output_gradients)`` returns one gradient, or None, for each input. An op without one
            raises when somebody differentiates it.
        run: what to call instead of a launcher.
    """
    name = schema.partition("(")[0]

    def launch(*args: Any) -> Any:
        where = next(arg for arg in args if isinstance(arg, Tensor))
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"ditfast::{name} has no forward-mode derivative; run it under ditfast.backend('torch')")
        kernels().check_launchable(where)
        use_tiles(where.device)
        with kernels().current_device(where.device):
            return getattr(kernels(), name)(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if save is not None:
            save(ctx, inputs, output)

    def no_second_derivative(*_: Any) -> Any:
        raise RuntimeError(
            f"ditfast::{name} has no derivative; second derivatives need the forward to run under ditfast.backend('torch')"
        )

    _library.define(schema)
    _library.impl(name, run or launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditfast::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"ditfast::{name}", backward or no_second_derivative, setup_context=setup_context, lib=_library
    )
    return getattr(torch.ops.ditfast, name).default
