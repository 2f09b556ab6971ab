"""What was measured on a device, in a JSON file of the user's cache folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from ..files import cache_folder, whole_file
from ..problem import SIZES, Problem

FORMAT = 1
PACKAGES = ("ditfast", "triton", "flash-attn")
VARIABLE = "DITFAST_TUNING"
OFF = "off"

Tile: TypeAlias = tuple[int, ...]
TileKey: TypeAlias = tuple[str, str, torch.dtype, int, tuple[int, ...]]  # as kernels.tuned.Key


class Entry(NamedTuple):
    """Of one problem, as ``Problem.bucket`` has it."""

    ms: Mapping[str, float]  # by route, each at its best tiles
    excluded: Mapping[str, str] = {}  # by route, the reason
    tiles: Mapping[TileKey, Tile] = {}  # of Triton's kernels, where the built-in ones are not the fastest


def path_of(device_name: str) -> Path | None:
    """Of a device's record; None if the environment says ``DITFAST_TUNING=off``."""
    given = os.environ.get(VARIABLE, "")
    if given == OFF:
        return None
    if given:
        return Path(given)
    return cache_folder("tuning") / f"{slug(device_name)}.json"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions_of(device_name: str) -> dict[str, str]:
    """Of all that a measurement on a device depends on."""
    found = {"device": device_name, "driver": _driver(), "torch": torch.__version__}  # which names its CUDA or ROCm
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _driver() -> str:
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text("ascii").strip()
        except OSError:
            continue
    return "unknown"


def of_device(device_name: str) -> dict[Problem, Entry]:
    """The record of a device; empty where there is none that serves."""
    path = path_of(device_name)
    return {} if path is None else load(path, versions_of(device_name))


def load(path: Path, versions: Mapping[str, str]) -> dict[Problem, Entry]:
    """Empty if there is no such file, and with a warning if it is damaged or of other versions."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, f"cannot be read ({error})")
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            return _ignored(path, f"has format {content['format']}, this ditfast reads {FORMAT}")
        changed = [
            f"{name} {content['versions'].get(name)}, now {version}"
            for name, version in versions.items()
            if content["versions"].get(name) != version
        ]
        entries = dict(map(_entry, content["entries"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _ignored(path, "is damaged")
    return _ignored(path, f"was measured with {'; '.join(changed)}") if changed else entries


def save(path: Path, versions: Mapping[str, str], entries: Mapping[Problem, Entry]) -> None:
    """Adds entries to those that the file holds, if they are of the same versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file that is replaced
        merged = {**load(path, versions), **entries}
    content = {"format": FORMAT, "versions": dict(versions), "entries": [_json(*item) for item in merged.items()]}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _ignored(path: Path, why: str) -> dict[Problem, Entry]:
    warnings.warn(f"tuning record {path} {why}: it is ignored; `ditfast tune` measures again", stacklevel=2)
    return {}


def _json(problem: Problem, entry: Entry) -> dict[str, Any]:
    tiles = [
        [kernel, arch, _name(dtype), rows, sizes, tile] for (kernel, arch, dtype, rows, sizes), tile in entry.tiles.items()
    ]
    described = {**problem._asdict(), "dtype": _name(problem.dtype)}
    return {**described, "ms": dict(entry.ms), "excluded": dict(entry.excluded), "tiles": tiles}


def _entry(item: dict[str, Any]) -> tuple[Problem, Entry]:
    """Raises ValueError, KeyError or TypeError for anything that ``_json`` would not have written."""
    problem = Problem(item["op"], _dtype(item["dtype"]), int(item["rows"]), _sizes(item["sizes"]), bool(item["training"]))
    if len(problem.sizes) != len(SIZES[problem.op]):
        raise ValueError(f"sizes: got {problem.sizes}, expected {SIZES[problem.op]}")
    ms = {str(route): float(time) for route, time in item["ms"].items()}
    if not all(time > 0 for time in ms.values()):
        raise ValueError(f"ms: got {ms}, expected positive times")
    tiles = {
        (str(kernel), str(arch), _dtype(dtype), int(rows), _sizes(sizes)): _sizes(tile)
        for kernel, arch, dtype, rows, sizes, tile in item["tiles"]
    }
    return problem, Entry(ms, dict(item["excluded"]), tiles)


def _sizes(values: list[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: got {name!r}, expected a torch dtype")
    return found
