"""Every route of a problem and every tile of its kernels: checked against plain torch, then timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import kernels, on_trial
from ..ops.routes import ROUTES, has_triton, why_not
from ..problem import Problem
from .clock import Clock
from .examples import Example, example
from .record import Entry, Tile, TileKey

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Unit roundoffs by which two right results may differ, normwise: a few roundings of 16-bit values, or a sum of thousands in
# fp32 in another order. A wrong result differs by about its size.
ROUNDINGS = {torch.float32: 512, torch.bfloat16: 8, torch.float16: 8}


@dataclass
class Measured:
    """What is known of a problem so far."""

    problem: Problem
    times: int  # in the model
    ms: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    tiles: dict[TileKey, Tile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was skipped, and why

    @property
    def entry(self) -> Entry:
        return Entry(self.ms, self.excluded, self.tiles)

    @property
    def plain(self) -> str:
        return ROUTES[self.problem.op][0]

    @property
    def winner(self) -> str:
        return min(self.ms, key=lambda route: self.ms[route])


def measure_routes(found: Measured, clock: Clock) -> None:
    """Each route that the device has, Triton at its built-in tiles; none if plain torch cannot be run."""
    before = len(found.notes)
    with _posed(found, clock) as posed:
        for route in ROUTES[found.problem.op]:
            if why_not(route, clock.device, found.problem):
                continue
            try:
                found.ms[route] = posed.ms(route, {})
            except Exception as error:  # of somebody else's code, in a configuration that may be nobody's yet
                if isinstance(error, torch.OutOfMemoryError) or route == found.plain:
                    raise
                found.excluded[route] = _line(error)
    if len(found.notes) > before:
        found.ms.clear()


def measure_tiles(found: Measured, clock: Clock, in_time: Callable[[], bool]) -> None:
    """The tiles of each kernel that the Triton route launches, of one after the other, as long as there is time."""
    if "triton" not in found.ms:
        return
    with _posed(found, clock) as posed:
        for key, tiles in posed.asked().items():
            for tile in tiles[1:]:
                if not in_time():
                    return
                try:
                    ms = posed.ms("triton", {**found.tiles, key: tile})
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    found.notes.append(f"{key[0]} in tiles of {_sizes(tile)} excluded: {_line(error)}")
                    continue
                if ms < found.ms["triton"]:
                    found.ms["triton"] = ms
                    found.tiles[key] = tile


class Wrong(Exception):
    """A route's results are not those of plain torch."""


class _Posed:
    """A problem on a device: copies of its inputs, and the results of plain torch for the first."""

    def __init__(self, found: Measured, clock: Clock):
        self.op, self.dtype, self.clock = found.problem.op, found.problem.dtype, clock
        first = example(found.problem, clock.device, seed=0)
        others = range(1, clock.copies(first.nbytes))
        self.examples = [first, *(example(found.problem, clock.device, seed) for seed in others)]
        self.expected = self._run(found.plain, {}, first)

    def ms(self, route: str, tiles: Mapping[TileKey, Tile]) -> float:
        """Raises Wrong, or what the route raises."""
        check(self._run(route, tiles, self.examples[0]), self.expected, self.dtype)
        with on_trial(self.op, route), _tiles(tiles):
            return self.clock.median_ms([one.run for one in self.examples])

    def asked(self) -> Mapping[TileKey, Sequence[Tile]]:
        with kernels().tuned.asking() as asked:
            self._run("triton", {}, self.examples[0])
        return asked

    def _run(self, route: str, tiles: Mapping[TileKey, Tile], one: Example) -> tuple[Tensor, ...]:
        with on_trial(self.op, route), _tiles(tiles):
            return one.run()


@contextlib.contextmanager
def _posed(found: Measured, clock: Clock) -> Iterator[_Posed]:
    """What goes wrong inside is noted, with what it is that cannot be measured."""
    try:
        yield _Posed(found, clock)
    except torch.OutOfMemoryError:
        found.notes.append("skipped: the device has too little memory")
    except Exception as error:
        found.notes.append(f"skipped: plain torch failed: {_line(error)}")


def check(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises Wrong if results differ by more than rounding."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise Wrong(f"result {i} is {tuple(one.shape)} {one.dtype}, plain torch's {tuple(other.shape)} {other.dtype}")
        difference, allowed = _difference(one.float(), other.float()), ROUNDINGS[dtype] * UNIT_ROUNDOFF[dtype]
        if not difference <= allowed:
            raise Wrong(f"result {i} is off by {difference:.1e}, {allowed:.1e} allowed")


def _difference(found: Tensor, expected: Tensor) -> float:
    """Of the worst row, relative to its norm, or to that of a mean row: one row that is wrong shows."""
    if found.numel() == 0:
        return 0.0
    rows = expected.flatten(0, -2) if expected.dim() > 1 else expected[None]  # [rows, columns]
    norms = rows.norm(dim=1)
    return ((found.view_as(rows) - rows).norm(dim=1) / norms.clamp(min=max(norms.mean().item(), 1e-30))).max().item()


def _tiles(tiles: Mapping[TileKey, Tile]) -> contextlib.AbstractContextManager[Any]:
    if not has_triton():
        return contextlib.nullcontext()
    tuned = kernels().tuned
    return tuned.trying({tuned.Key(*key): tile for key, tile in tiles.items()})


def _sizes(tile: Tile) -> str:
    return "x".join(map(str, tile))


def _line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, Wrong) else f"{type(error).__name__}: {first}"
