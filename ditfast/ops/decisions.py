"""Which route an op takes on a CUDA device: measured there, else predicted, else the default; and why, in words."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ..flops import DeviceSpec
from ..prediction import predicted_ms, spec_of
from ..problem import Problem
from ..tuning import record
from ..tuning.record import Entry
from .routes import ROUTES, Choice, default, has_triton, why_not

ALIKE = 1.1  # predictions nearer than this do not overrule the default


class Evidence(NamedTuple):
    """What is known of a device."""

    entries: Mapping[Problem, Entry] = {}
    predict: Callable[[Problem, str], float | None] = lambda problem, route: None  # ms


@functools.cache
def evidence(device: torch.device) -> Evidence:
    """The device's tuning record, read once, and predictions for it; nothing where there is no such device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Evidence()
    return evidence_of(torch.cuda.get_device_name(device), spec_of(device))


def evidence_of(device_name: str, spec: DeviceSpec | None) -> Evidence:
    entries = record.of_device(device_name)
    if spec is None:
        return Evidence(entries)
    return Evidence(entries, lambda problem, route: predicted_ms(problem, route, spec))


@functools.lru_cache(4096)
def decide(device: torch.device, problem: Problem) -> Choice:
    bucket, known = problem.bucket(), evidence(device)
    usual = default(device, bucket)
    possible = [route for route in ROUTES[problem.op] if not why_not(route, device, bucket)]
    entry = known.entries.get(bucket)
    if entry is not None and entry.ms.keys() & set(possible):
        return measured(entry, possible)
    if len(possible) == 1:
        return usual
    predicted = {route: known.predict(bucket, route) for route in possible}
    return foreseen(usual, {route: ms for route, ms in predicted.items() if ms is not None})


def measured(entry: Entry, possible: list[str]) -> Choice:
    """The fastest; plain torch, which comes first, where it is as fast."""
    times = {route: entry.ms[route] for route in possible if route in entry.ms}
    route = min(times, key=lambda route: times[route])
    excluded = [f"; {name} excluded: {why}" for name, why in entry.excluded.items() if name in possible]
    return Choice(route, f"measured {_listed(route, times)}{''.join(excluded)}")


def foreseen(usual: Choice, times: Mapping[str, float]) -> Choice:
    """The one predicted to be fastest, if that is clear; else the default."""
    if usual.route not in times or len(times) == 1:
        return usual
    route = min(times, key=lambda route: times[route])
    if route == usual.route:
        return Choice(route, f"predicted {_listed(route, times)}; not measured")
    if times[route] * ALIKE > times[usual.route]:
        return Choice(usual.route, f"{usual.why}; predicted alike, {_listed(usual.route, times)}; not measured")
    return Choice(route, f"predicted {_listed(route, times)}; not measured")


def _listed(first: str, times: Mapping[str, float]) -> str:
    others = [f", {route} {1e3 * ms:.3g} us" for route, ms in times.items() if route != first]
    return f"{1e3 * times[first]:.3g} us{''.join(others)}"


@functools.cache
def use_tiles(device: torch.device) -> None:
    """Hands the tiles of the device's record to the launchers."""
    tiles = {key: tile for entry in evidence(device).entries.values() for key, tile in entry.tiles.items()}
    if tiles and has_triton():
        from ditfast.kernels import tuned

        tuned.TILES.update({tuned.Key(*key): tile for key, tile in tiles.items()})


def forget() -> None:
    """Records are read again at the next choice; what torch.compile has traced stays as it is."""
    for cached in (evidence, decide, use_tiles):
        cached.cache_clear()
    if "ditfast.kernels" in sys.modules:
        sys.modules["ditfast.kernels"].tuned.TILES.clear()
