"""The tuning cache: what ``ditfast tune`` measured on a device, in a JSON file of the user's cache folder."""

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

from ..files import cache_folder
from .shapes import OpShape, size_names

FORMAT = 2
PACKAGES = ("ditfast", "triton", "flash-attn")
VARIABLE = "DITFAST_TUNING"
OFF = "off"

Config: TypeAlias = tuple[int, ...]
ConfigKey: TypeAlias = tuple[str, str, torch.dtype, int, tuple[int, ...]]  # as kernels.tiles.Key


class Entry(NamedTuple):
    """Measurements of one shape, as ``OpShape.bucket`` rounds it."""

    ms: Mapping[str, float]  # by backend, each at its best kernel configs
    excluded: Mapping[str, str] = {}  # by backend, the reason
    configs: Mapping[ConfigKey, Config] = {}  # of Triton's kernels, where the built-in ones are not the fastest


def path_of(device_name: str) -> Path | None:
    """Return the path of a device's cache; None if the environment says ``DITFAST_TUNING=off``."""
    given = os.environ.get(VARIABLE, "")
    if given == OFF:
        return None
    if given:
        return Path(given)
    return cache_folder("tuning") / f"{slug(device_name)}.json"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions_of(device_name: str) -> dict[str, str]:
    """Return the versions of all that a measurement on a device depends on."""
    versions = {"device": device_name, "driver": _driver(), "torch": torch.__version__}  # which names its CUDA or ROCm
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def _driver() -> str:
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text("ascii").strip()
        except OSError:
            continue
    return "unknown"


def of_device(device_name: str) -> dict[OpShape, Entry]:
    """Return the cache of a device; empty where there is none that serves."""
    path = path_of(device_name)
    return {} if path is None else load(path, versions_of(device_name))


def load(path: Path, versions: Mapping[str, str]) -> dict[OpShape, Entry]:
    """Return the entries; none if there is no such file, and none with a warning if it is damaged or of other versions."""
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


def _ignored(path: Path, why: str) -> dict[OpShape, Entry]:
    warnings.warn(f"tuning cache {path} {why}: it is ignored; `ditfast tune` measures again", stacklevel=2)
    return {}


def _entry(item: dict[str, Any]) -> tuple[OpShape, Entry]:
    """Raise ValueError, KeyError or TypeError for anything that ``ditfast tune`` would not have written."""
    shape = OpShape(item["op"], _dtype(item["dtype"]), int(item["rows"]), _sizes(item["sizes"]), bool(item["training"]))
    if len(shape.sizes) != len(size_names(shape.op)):
        raise ValueError(f"sizes: got {shape.sizes}, expected {size_names(shape.op)}")
    ms = {str(backend): float(time) for backend, time in item["ms"].items()}
    if not all(time > 0 for time in ms.values()):
        raise ValueError(f"ms: got {ms}, expected positive times")
    configs = {
        (str(kernel), str(arch), _dtype(dtype), int(rows), _sizes(sizes)): _sizes(config)
        for kernel, arch, dtype, rows, sizes, config in item["configs"]
    }
    return shape, Entry(ms, dict(item["excluded"]), configs)


def _sizes(values: list[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {name!r}, expected a torch dtype")
    return dtype
