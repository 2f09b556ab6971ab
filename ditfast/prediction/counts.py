"""The static counts of our kernels, by tile and target, and the tiles that launchers choose: ``counts.json``.

python -m ditfast.kernels.inspect --arch sm_80 sm_90 sm_100 gfx942 --counts ditfast/prediction/counts.json
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).with_name("counts.json")
RESIDENT_WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "gfx942": 32}  # of a multiprocessor at most
WIDEST_COLUMNS = 256
MASKED_WIDTH = 1536  # the width that stands for those that do not divide into chunks
MASKED_BLOCK = 2048


class Count(NamedTuple):
    """Of one kernel at one tile, for one target."""

    sizes: tuple[int, ...]  # of the tile
    programs: int  # resident on a multiprocessor
    instructions: float  # of all warps of a program, for each step of the main loop or for each row
    outside: float  # of a program, outside of the loop


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding="utf-8"))


@functools.cache
def _by_case() -> Mapping[tuple[str, str, str], Count]:
    return {(row["arch"], row["kernel"], row["case"]): _count(row) for row in _rows()}


@functools.cache
def _by_tile() -> Mapping[tuple[str, str, tuple[int, ...]], Count]:
    """Matrix kernels; of several cases the first, which is the plain one."""
    found: dict[tuple[str, str, tuple[int, ...]], Count] = {}
    for row in _rows():
        count = _count(row)
        if row["per"] == "step":
            found.setdefault((row["arch"], row["kernel"], count.sizes), count)
    return found


def _rows() -> list[dict[str, Any]]:
    file = _file()
    return [dict(zip(file["fields"], row, strict=True)) for row in file["rows"]]


def _count(row: dict[str, Any]) -> Count:
    sizes, warps, *_ = row["tile"].split()
    programs = round(row["occupancy"] * RESIDENT_WARPS[row["arch"]] / int(warps.removesuffix("w")))
    return Count(tuple(map(int, sizes.split("x"))), max(1, programs), row["instructions"], row["outside"])


def rows(arch: str, kernel: str, width: int, kind: str = "") -> Count | None:
    """Of a row kernel; a width without a count is taken for one that is masked."""
    found = _by_case().get((arch, kernel, f"D={width} {kind}".strip()))
    if found is not None:
        return found
    masked = _by_case().get((arch, kernel, f"D={MASKED_WIDTH} masked {kind}".strip()))
    block = 1 << (width - 1).bit_length()
    return None if masked is None else masked._replace(instructions=masked.instructions * block / MASKED_BLOCK)


def product(arch: str, kernel: str, M: int, N: int) -> Count | None:
    """Of a 16-bit product [M, N], at the tile that its launcher takes."""
    tiles = _file()["tiles"].get(arch)
    if tiles is None:
        return None
    by_rows = tiles["other" if N % WIDEST_COLUMNS else "wide"]
    m, n, k = next(tile[1:4] for tile in by_rows if tile[0] >= M)
    return _by_tile().get((arch, kernel, (m, n, k)))


def attention(arch: str, kernel: str, head: int, tokens: int) -> tuple[Count, int] | None:
    """Of a head dim, and of how many columns its blocks are."""
    heads = _file()["heads"]
    if str(head) not in heads:
        return None
    case = "d=72 T=16" if tokens <= 16 else f"d={head} T=256"
    count = _by_case().get((arch, kernel, case))
    return None if count is None else (count, heads[str(head)])
