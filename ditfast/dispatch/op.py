"""Calls of ops, and the implementation that each finds: by the signature of its arguments, once one call has chosen it.

An op has two halves. The torch half is plain torch: autograd and torch.compile see through it. The Triton half launches
kernels, forward and backward, so a backward runs where its forward ran. The first call with a signature checks the arguments
and selects one; later calls look the selection up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ..torch_modes import needs_gradient, under_autocast
from .launchers import launchers, triton_kernels
from .library import define_op
from .override import _override
from .plan import Plan, Recorder, can_record, remember, signature
from .selection import recorders, untransformed, use_measured_configs


class TritonOp:
    """A launcher of ``ditfast.kernels``, registered as ``ditfast::name``.

    In eager mode a launch plan does its work, and a gradient goes through a ``torch.autograd.Function``.

    Args:
        schema: as for ``torch.library.define``. A last argument ``bool training`` says whether a backward follows.
        fake: the same call on tensors without data, for torch.compile.
        save: ``save(ctx, inputs, output)`` keeps what the backward needs. Outputs that nothing used have no gradient
            there, where torch would make up zeros.
        backward: ``backward(ctx, *output_gradients)`` returns one gradient, or None, for each input. An op without one
            raises when somebody differentiates it.
        outputs: how many of the launcher's outputs a call returns; None for whatever it returns.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        *,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        outputs: int | None = None,
    ):
        self.name = schema.partition("(")[0]
        self.takes_training = "bool training)" in schema
        self.outputs = outputs
        self.registered = define_op(schema, fake, save=save, backward=backward, run=self._run_registered)
        self.function = None if backward is None else _function(self, save, backward)
        self._plans = remember()

    def __call__(self, *args: Any) -> Any:
        """Call on the launcher's arguments, less ``training``."""
        if not torch.compiler.is_compiling() and is_eager():
            key, training = signature(args)
            if key is not None:
                return self.launch(key, args, training)
        return self.trace(*args)

    def trace(self, *args: Any) -> Any:
        """Call the registered op, which whatever traces, transforms or profiles the call sees."""
        if self.takes_training:
            args = (*args, needs_gradient(*(arg for arg in args if isinstance(arg, Tensor))))
        return self._wanted(self.registered(*args))

    def launch(self, key: tuple[Any, ...], args: tuple[Any, ...], training: bool) -> Any:
        """Call in eager mode, on arguments of the signature ``key``."""
        if not training:
            return self.planned(key, args, _training(self.takes_training, False))
        if self.function is None:  # torch.library raises if somebody differentiates
            return self.trace(*args)
        return self._wanted(self.function.apply(*args, key))

    def planned(self, key: tuple[Any, ...], args: tuple[Any, ...], training: tuple[bool, ...], whole: bool = False) -> Any:
        """Launch by the plan for this key; the first time by the launcher, whose work becomes the plan."""
        plans = self.plans(key, whole)
        if plans:
            return plans[0](*args)
        launch = functools.partial(self._launch, training, whole)
        if not can_record():
            return launch(*args)
        with Recorder(args) as recorder:
            made = launch(*recorder.args)
        plans.append(Plan(recorder, made, launch) if recorder.is_complete else launch)
        return made

    def plans(self, key: tuple[Any, ...], whole: bool = False) -> list[Callable[..., Any]]:
        """Return the plan for a key in a list, an empty one before the first launch."""
        return self._plans((key, whole))

    def _launch(self, training: tuple[bool, ...], whole: bool, *args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device
        triton_kernels().check_launchable(device)
        use_measured_configs(device)
        with triton_kernels().current_device(device):
            made = launchers()[self.name](*args, *training)
        return made if whole else self._wanted(made)

    def _run_registered(self, *args: Any) -> Any:
        key, _ = signature(args)
        return self._launch((), True, *args) if key is None else self.planned(key, args, (), whole=True)

    def _wanted(self, made: Any) -> Any:
        if self.outputs is None:
            return made
        return made[0] if self.outputs == 1 else made[: self.outputs]


def _training(takes_training: bool, training: bool) -> tuple[bool, ...]:
    return (training,) if takes_training else ()


def _function(op: TritonOp, save: Callable[..., None] | None, backward: Callable[..., Any]) -> type[torch.autograd.Function]:
    """Return the op with its gradient for eager mode; its arguments are the op's, and their signature.

    Of what torch has it costs least. Host microseconds of an op of three tensors whose kernel does nothing, torch 2.13 on two
    cores of a Zen 3: this 29, with ``setup_context`` 85, ``torch.library`` 73, ``custom_op`` 128.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, key = args
            training = _training(op.takes_training, True)
            made = op.planned(key, tuple(inputs), training, whole=True)
            ctx.set_materialize_grads(False)
            if save is not None:
                save(ctx, (*inputs, *training), made)
            return made

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            found = backward(ctx, *gradients)
            found = found if isinstance(found, tuple) else (found,)
            return (*found[: len(found) - op.takes_training], None)

    return Function


class Op:
    """An op: its implementations, and the function that selects one.

    Args:
        select: checks the arguments and returns an implementation's name; it is told whether a backward may follow.
        triton: the Triton half.
        prepare: from the op's arguments to those of ``triton``, where they differ: the signature of the first and the types of
            the others determine what is launched.
        autocast: which arguments autocast casts.
        is_asked: the caller named the backend that ``select`` returns.
        implementations: the others, by name, on the op's arguments.
    """

    def __init__(
        self,
        select: Callable[..., str],
        triton: TritonOp,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
        *,
        autocast: slice = slice(0),
        is_asked: bool = False,
        **implementations: Callable[..., Any],
    ):
        self.select = select
        self.triton = triton
        self.prepare = prepare
        self.autocast = autocast
        self.is_asked = is_asked
        self.implementations = implementations
        self._calls = remember()

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._trace(*self._cast(args))
        if _is_any_autocast_enabled():
            args = self._cast(args)
        if not is_eager():
            return self._trace(*args)
        key, training = signature(args)
        if key is None:
            return self._trace(*args)
        calls = self._calls((_override.get(), key))
        if calls:
            return calls[0](*args)
        backend = self.select(*args, training)
        if backend != "triton":
            calls.append(self.implementations[backend])
        elif self.prepare is None:
            made = self.triton.launch(key, args, training)
            calls += [lambda *args: self.triton.launch(key, args, True)] if training else self.triton.plans(key)
            return made
        else:
            calls.append(self._prepared(self.prepare, key, training))
        return calls[0](*args)

    def _prepared(self, prepare: Callable[..., tuple[Any, ...]], key: tuple[Any, ...], training: bool) -> Callable[..., Any]:
        plans_of: dict[tuple[type, ...], list[Callable[..., Any]]] = {}  # quicker to ask than the triton half, by a short key

        def call(*args: Any) -> Any:
            args = prepare(*args)
            types = tuple(map(type, args))
            plans = plans_of.get(types)
            if plans and not training:
                return plans[0](*args)
            made = self.triton.launch((key, *types), args, training)
            plans_of[types] = self.triton.plans((key, *types))
            return made

        return call

    def _trace(self, *args: Any) -> Any:
        backend = self.select(*args, needs_gradient(*(arg for arg in args if isinstance(arg, Tensor))))
        backend = untransformed(self.triton.name, backend, self.is_asked)
        if backend != "triton":
            return self.implementations[backend](*args)
        return self.triton.trace(*(args if self.prepare is None else self.prepare(*args)))

    def _cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        cast = self.autocast
        return (*args[: cast.start], *under_autocast(*args[cast]), *args[cast.stop :]) if cast.stop else args


def is_eager() -> bool:
    """Return whether nothing but autograd has to see a call: no tracing, transform, profiler or record of calls."""
    return not (
        _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or recorders
        or _profiler_enabled()
    )
