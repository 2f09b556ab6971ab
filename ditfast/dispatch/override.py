"""Backends that context managers force, in this thread, and what torch.compile guards on for them."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

BACKENDS = ("torch", "triton")
ATTENTION_BACKENDS = ("flash", "sdpa", "triton")


class Override(NamedTuple):
    """The backends that are forced."""

    backend: str | None = None  # of every op
    attention: str | None = None
    trial: tuple[str, str] | None = None  # one op and its backend, for who measures them


_override: ContextVar[Override] = ContextVar("ditfast.override", default=Override())  # noqa: B039 (a NamedTuple cannot change)
# torch.compile cannot read a ContextVar. It can guard on a global, by identity: so one object stands for each override, and a
# compiled graph follows the one that was entered last and is still in force, whichever thread did.
_NOTHING = Override()
_one_of_each = {_NOTHING: _NOTHING}
_in_force: list[Overriding] = []
_latest = _NOTHING


class Overriding:
    """A context manager that sets the override, in this thread; may be entered again once it was left."""

    def __init__(self, override: Override):
        self.override = _one_of_each.setdefault(override, override)

    def __enter__(self) -> None:
        self.token = _override.set(self.override)
        _in_force.append(self)
        self._update()

    def __exit__(self, *_: object) -> None:
        _override.reset(self.token)
        _in_force.remove(self)
        self._update()

    @staticmethod
    def _update() -> None:
        global _latest
        _latest = _in_force[-1].override if _in_force else _NOTHING


def backend(name: str) -> Overriding:
    """Force every op inside the ``with`` block, in this thread, onto plain torch or onto the Triton kernels.

    Without it CPU tensors take torch, and CUDA tensors what is fastest: as ``ditfast tune`` measured it, else
    Triton for all but plain products; ``ditfast doctor`` shows which, and why. ``"triton"`` on CPU tensors runs in
    Triton's interpreter (TRITON_INTERPRET=1 before the first import of ditfast). A backward runs on the backend of its
    forward; the recomputation of ``torch.utils.checkpoint`` does if it is given ``context_fn=ditfast.checkpoint_contexts``.

    Raises:
        ValueError: the name is neither ``"torch"`` nor ``"triton"``.
    """
    return _overriding("backend", name, BACKENDS)


def attention_engine(name: str) -> Overriding:
    """Force ``attention`` inside the ``with`` block, in this thread, onto ``"flash"``, ``"sdpa"`` or ``"triton"``.

    Raises:
        ValueError: none of these names.
    """
    return _overriding("attention", name, ATTENTION_BACKENDS)


def _overriding(field: str, name: str, allowed: tuple[str, ...]) -> Overriding:
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"{field}: got {name!r}, expected one of {', '.join(allowed)}")
    fields: dict[str, Any] = {field: name}
    return Overriding(_override.get()._replace(**fields))


def on_trial(op: str, backend: str) -> Overriding:
    """Force one op onto a backend inside the ``with`` block, in this thread, whatever is known of it, to measure it."""
    return Overriding(_override.get()._replace(trial=(op, backend)))


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Return the contexts of ``torch.utils.checkpoint``'s ``context_fn``: the recomputation makes the choices of the forward.

    It runs in the backward, perhaps on another thread, where the forward's ``with ditfast.backend(...)`` does not reach.
    """
    return contextlib.nullcontext(), Overriding(_override.get())


def current_override() -> Override:
    return _latest if torch.compiler.is_compiling() else _override.get()
