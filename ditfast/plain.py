"""Modules that must be called (hooks, LoRA, wrappers), and those whose weights may be read instead."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

PLAIN_TYPES = (nn.Parameter, Tensor)


def is_unhooked(module: nn.Module) -> bool:
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])


def is_silent(module: nn.Module) -> bool:
    """Return True if nobody would notice that a module is not called: no hooks, no forward of its own, not compiled."""
    own = module.__dict__  # where reading is quick: this is asked of every layer at every forward
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl")
        or _has_any_global_hook()
    )


def plain_weights(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a Linear or Conv2d, if calling it is nothing but the product with the one and the sum with the other.

    Else somebody hooked, wrapped, replaced, parametrised or quantised it (LoRA, weight norm, offloading), and expects it to
    be called: None.
    """
    own = module.__dict__  # where reading is quick: this is asked of every linear at every forward
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    if (
        type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
        and is_silent(module)
        and type(weight) in PLAIN_TYPES
        and bias is not None
    ):
        return weight, bias
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether a Linear or Conv2d has ``plain_weights``."""
    return plain_weights(module) is not None


def descendants(module: nn.Module, but: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield each descendant behind its parent and its name there, but for some with all that is in them."""
    for name, child in module.named_children():
        if not any(child is one for one in but):
            yield module, name, child
            yield from descendants(child, but)


class Snapshot:
    """All that torch and Python tell about modules: classes, attributes, hooks, children and parameters.

    Args:
        modules: one look at all of them, in ``holds``, takes about a third of what asking one after the other does.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(modules)
        self._classes: set[Any] = set(map(type, self._modules))
        self._own = [vars(module) for module in self._modules]
        contents = [value for own in self._own for value in own.values() if isinstance(value, dict)]  # hooks, parameters, ...
        self._empty = [content for content in contents if not content]
        self._filled = [content for content in contents if content]
        self._attributes = [
            itemgetter(*(name for name, value in own.items() if not isinstance(value, dict | set))) for own in self._own
        ]
        self._gone: list[object] = []  # references to tensors that nobody holds any more
        self._items = [self._weakly(item) for item in chain.from_iterable(map(dict.values, self._filled))]
        self._state = self._current_state()

    def holds(self) -> bool:
        """Return True if nothing has changed since."""
        try:
            return (
                not self._gone
                and not any(self._empty)
                and not _has_any_global_hook()
                and self._current_state() == self._state
                and all(map(is_, chain.from_iterable(map(dict.values, self._filled)), [item() for item in self._items]))
            )
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone; tensors, or arrays, cannot be compared as one
            return False

    def _current_state(self) -> tuple[list[Any], ...]:
        return (
            [*map(type, self._modules)],
            [kind.forward for kind in self._classes],
            [*map(len, self._own)],
            [*map(len, self._filled)],
            [attributes(own) for attributes, own in zip(self._attributes, self._own, strict=True)],
        )

    def _weakly(self, item: Any) -> Callable[[], Any]:
        """Return what returns the item, which is not kept alive if it is a tensor."""
        return weakref.ref(item, self._gone.append) if isinstance(item, Tensor) else lambda: item
