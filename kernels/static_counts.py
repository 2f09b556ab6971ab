"""The counts of ``inspect`` as a compact file, with the tiles that launchers choose: what ``ditfast.prediction`` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from .ahead import compiling_for
from .attention_tiles import head_blocks
from .inspect_cases import tensor
from .linear import linear
from .tiles import BY_ROWS, WIDE

FIELDS = ("arch", "kernel", "case", "tile", "registers", "shared", "occupancy", "instructions", "per", "outside")
HEADS = (32, 64, 72, 96, 128)
WIDEST = WIDE[0].n
COLUMNS = {"wide": WIDEST, "other": WIDEST + 1}
K = 64
MANY_ROWS = 1 << 30


def write_counts(path: Path, rows: Iterable[Any], archs: Sequence[str]) -> None:
    """``rows`` of ``inspect``, one a line, so that a change of the file can be read.

    Raises:
        OSError: the file cannot be written.
    """
    head = {
        "triton": triton.__version__,
        "heads": {str(head): head_blocks(head, torch.bfloat16).width for head in HEADS},
        "tiles": {arch: {columns: gemm_tiles(arch, N) for columns, N in COLUMNS.items()} for arch in archs},
        "fields": FIELDS,
    }
    lines = (json.dumps([_short(getattr(row, field)) for field in FIELDS]) for row in rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def gemm_tiles(arch: str, N: int) -> list[list[int]]:
    """Of 16-bit products with N columns: [largest number of rows that takes the tile, its m, n, k, warps and stages]."""
    found = []
    for largest, _ in BY_ROWS.get(arch, BY_ROWS["default"]):
        M = MANY_ROWS if largest == math.inf else int(largest)
        with compiling_for(arch) as builds:
            linear(tensor(M, K), tensor(N, K), tensor(N))
        (build,) = builds
        sizes = (build.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        found.append([M, *sizes, build.options["num_warps"], build.options["num_stages"]])
    return found


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
