"""The writer of the tuning cache, which ``ditfast.dispatch.tuning_cache`` reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..dispatch.shapes import OpShape
from ..dispatch.tuning_cache import FORMAT, Entry, load
from ..files import whole_file


def save(path: Path, versions: Mapping[str, str], entries: Mapping[OpShape, Entry]) -> None:
    """Add entries to those that the file holds, if they are of the same versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file that is replaced
        merged = {**load(path, versions), **entries}
    content = {"format": FORMAT, "versions": dict(versions), "entries": [_json(*item) for item in merged.items()]}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _json(shape: OpShape, entry: Entry) -> dict[str, Any]:
    configs = [
        [kernel, arch, _name(dtype), rows, sizes, config]
        for (kernel, arch, dtype, rows, sizes), config in entry.configs.items()
    ]
    described = {**shape._asdict(), "dtype": _name(shape.dtype)}
    return {**described, "ms": dict(entry.ms), "excluded": dict(entry.excluded), "configs": configs}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
