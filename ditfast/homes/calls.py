"""Calls of modules: the tensors in their arguments, and the lengths of sequences that a parity check covers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from .home import Swap


class Lengths(NamedTuple):
    """Shortest and longest sequence that a parity check covers; ``longest`` is 0 where it covers none yet."""

    shortest: int
    longest: int

    def cover(self, tokens: int) -> bool:
        return self.shortest <= tokens <= self.longest

    def including(self, tokens: int) -> Lengths:
        return Lengths(min(self.shortest, tokens), max(self.longest, tokens))


UNLIMITED = Lengths(0, sys.maxsize)
NO_LENGTHS = Lengths(sys.maxsize, 0)


def recomputed_later(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True for a forward of reentrant checkpointing: without gradients, on inputs that need them.

    It runs again in the backward, and both runs have to be alike.
    """
    return any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))


def is_tensor(value: object, dim: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == dim


def tokens_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the longest T of a call's tensors [B, T, D]."""
    return max([1, *(value.shape[1] for value in (*args, *kwargs.values()) if is_tensor(value, 3))])


def unused(swap: Swap, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return why a fast forward leaves a call that has arguments beyond its own; nothing if all are None by default too."""
    if not args and not kwargs:
        return ""
    names = [name for name, value in kwargs.items() if value is not None or name not in swap.optional]
    if any(value is not None for value in args):
        names = ["one more argument", *names]
    return f"called with {', '.join(names)}, which the fast forward does not use" if names else ""
