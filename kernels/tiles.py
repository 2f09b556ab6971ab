"""Which tile a kernel takes: what was measured on the device, else explicit choices by architecture and number of rows.

Whoever measures fills ``TILES``; nothing here reads files or times anything. A choice whose buffers exceed the device's shared
memory is passed over for the next one, before anything is launched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton

from .launch import interpreted, target

SHARED_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
SMALLEST_SHARED_BYTES = 65536  # AMD's, and less than any NVIDIA GPU since Ampere has


# ------------------------------------------------------------------------------------------------ what was measured
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


# ------------------------------------------------------------------------------------------------ products
class GemmTile(NamedTuple):
    """A program's share of a product [M, N], and how its loop over K is pipelined."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def grid(self, M: int, N: int) -> int:
        return triton.cdiv(M, self.m) * triton.cdiv(N, self.n)

    def options(self, K: int) -> dict[str, int | bool]:
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "EVEN_K": K % self.k == 0,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def shared_bytes(self, itemsize: int) -> int:
        """Of the operands in flight, and of the result on its way to memory."""
        return max(self.num_stages * (self.m + self.n) * self.k * itemsize, self.m * self.n * 4)


INTERPRETER = GemmTile(64, 128, 128, num_warps=1, num_stages=1)  # which costs per program and operation, not per element
FULL_PRECISION = (GemmTile(64, 64, 16, num_warps=8, num_stages=3),)  # fewer warps or a longer step spill
# By the largest number of rows: small tiles where large ones would leave most of the multiprocessors idle.
FEW = (GemmTile(16, 64, 128, num_warps=4, num_stages=4), GemmTile(16, 64, 64, num_warps=4, num_stages=4))
SOME = (GemmTile(64, 64, 64, num_warps=4, num_stages=4), GemmTile(64, 64, 64, num_warps=4, num_stages=3))
MANY = (GemmTile(128, 128, 64, num_warps=8, num_stages=3), GemmTile(128, 128, 64, num_warps=8, num_stages=2))
HALF = (GemmTile(64, 128, 64, num_warps=8, num_stages=3), GemmTile(64, 128, 64, num_warps=8, num_stages=2))
WIDE = (GemmTile(128, 256, 64, num_warps=8, num_stages=3), *MANY)
BY_ROWS = {
    "sm_90": ((16, FEW), (512, SOME), (8192, MANY), (math.inf, WIDE)),
    "default": ((16, FEW), (512, SOME), (math.inf, MANY)),
}
# What measuring on a device may prefer to the choices above.
OTHERS = (
    *dict.fromkeys((*FEW, *SOME, *HALF, *MANY, *WIDE)),
    GemmTile(32, 64, 64, num_warps=4, num_stages=4),
    GemmTile(64, 128, 64, num_warps=4, num_stages=4),
    GemmTile(128, 64, 64, num_warps=4, num_stages=4),
    GemmTile(128, 128, 64, num_warps=4, num_stages=3),
    GemmTile(128, 128, 64, num_warps=8, num_stages=4),
    GemmTile(256, 128, 64, num_warps=8, num_stages=3),
    GemmTile(128, 256, 64, num_warps=8, num_stages=4),
)


def gemm_tile(
    kernel: str,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    largest: tuple[GemmTile, ...] = WIDE,
    full_precision: tuple[GemmTile, ...] = FULL_PRECISION,
) -> GemmTile:
    """For [M, K] times [K, N]; a kernel whose epilogue needs registers says the ``largest`` tile that leaves it some."""
    if interpreted():
        return INTERPRETER
    arch = target()
    choices = full_precision
    if dtype != torch.float32:
        buckets = BY_ROWS.get(arch, BY_ROWS["default"])
        choices = next(choices for largest, choices in buckets if largest >= M)
        if choices is WIDE and N % WIDE[0].n:  # the last column of tiles would be half empty
            choices = MANY
        choices = min(choices, largest, key=lambda tiles: _area(tiles[0]))
    others = full_precision if dtype == torch.float32 else [tile for tile in OTHERS if _area(tile) <= _area(largest[0])]
    builtin = first_that_fits(choices, dtype, arch)
    return tuned(kernel, dtype, M, (N, K), builtin, lambda: those_that_fit(others, dtype, arch))


def _area(tile: GemmTile) -> int:
    return tile.m * tile.n


def first_that_fits(choices: tuple[GemmTile, ...], dtype: torch.dtype, arch: str) -> GemmTile:
    fitting = those_that_fit(choices, dtype, arch)
    if not fitting:
        limit = SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)
        raise RuntimeError(f"no tile of {choices} fits the {limit} bytes of shared memory of {arch}")
    return fitting[0]


def those_that_fit(choices: Sequence[GemmTile], dtype: torch.dtype, arch: str) -> list[GemmTile]:
    limit = SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)
    return [tile for tile in choices if tile.shared_bytes(dtype.itemsize) <= limit]
