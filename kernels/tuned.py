"""Tiles that were measured to be fastest on a device; launchers look here before their built-in tables.

Whoever measures fills ``TILES``; nothing here reads files or times anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton

from .launch import target


class Key(NamedTuple):
    """What a tile was measured for."""

    kernel: str
    arch: str
    dtype: torch.dtype
    rows: int  # a power of two: as many, or fewer down to half of it
    sizes: tuple[int, ...]


Tile = TypeVar("Tile", bound=tuple[int, ...])

TILES: dict[Key, tuple[int, ...]] = {}
on_change: list[Callable[[], None]] = []  # called when launchers may choose other tiles than before
# Not a ContextVar: the backward asks on a thread of autograd's.
_asked: list[dict[Key, tuple[tuple[int, ...], ...]]] = []


def tuned(
    kernel: str, dtype: torch.dtype, rows: int, sizes: tuple[int, ...], builtin: Tile, others: Callable[[], Sequence[Tile]]
) -> Tile:
    """The tile measured for this launch, else the built-in one; ``others`` are those that could be measured, and fit."""
    if not TILES and not _asked:
        return builtin
    key = Key(kernel, target(), dtype, triton.next_power_of_2(rows), sizes)
    for asked in _asked:
        tiles: list[tuple[int, ...]] = [builtin, *others()]
        asked[key] = tuple(dict.fromkeys(tiles))
    make: Callable[..., Tile] = type(builtin)
    return make(*TILES[key]) if key in TILES else builtin


@contextlib.contextmanager
def asking() -> Iterator[dict[Key, tuple[tuple[int, ...], ...]]]:
    """What launches inside the ``with`` block look up, on any thread: the tiles each could take, the built-in one first."""
    asked: dict[Key, tuple[tuple[int, ...], ...]] = {}
    _asked.append(asked)
    _changed()
    try:
        yield asked
    finally:
        _asked.remove(asked)
        _changed()


@contextlib.contextmanager
def trying(tiles: Mapping[Key, tuple[int, ...]]) -> Iterator[None]:
    """Launches inside the ``with`` block, on any thread, take these tiles, all others the built-in ones."""
    before = dict(TILES)
    replace(tiles)
    try:
        yield
    finally:
        replace(before)


def replace(tiles: Mapping[Key, tuple[int, ...]]) -> None:
    """Take these tiles from now on, and the built-in ones for all other launches."""
    TILES.clear()
    TILES.update(tiles)
    _changed()


def _changed() -> None:
    for call in on_change:
        call()
