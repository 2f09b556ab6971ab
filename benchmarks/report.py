"""What a run leaves behind: tables to read and a JSON file to compute with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditfast.files import whole_file

from .rivals import GRAPH, LOOSE_BAR, OURS, kind_of, loose
from .rows import Row

OWN = (*OURS, "ditfast-swapped")


def print_tables(console: Console, rows: list[Row]) -> None:
    """The models, every rival's speed, how many times faster ditfast is than each, first calls; and what a GPU tells beside."""
    tables = [_models_table(rows), _speed_table(rows), _ratios_table(rows), _costs_table(rows)]
    if any(row.peak_memory_gb is not None for row in rows):
        tables.append(_roofline_table(rows))
    for table in tables:
        console.print(table)


def _models_table(rows: list[Row]) -> Table:
    table = Table(title="Models", title_justify="left", caption="GMACs are the paper's Gflops; one is two GFLOPs.")
    table.add_column("model", no_wrap=True)
    for column in ("GMACs", "GFLOPs", "parameters, M"):
        table.add_column(column, justify="right")
    for row in {row.model: row for row in rows}.values():
        table.add_row(row.model, f"{row.gmacs:.2f}", f"{row.gflops:.2f}", f"{row.parameters / 1e6:.1f}")
    return table


def _speed_table(rows: list[Row]) -> Table:
    caption = "Error: against the float64 reference."
    if any(loose(row.rival) for row in rows):
        caption += f" OpenVINO and int8 are held to {LOOSE_BAR}, not to eager PyTorch's error."
    table = _case_table("A forward of the batch", caption)
    for column in ("ms", "p20", "p80", "images/s", "TFLOP/s", "error"):
        table.add_column(column, justify="right", no_wrap=True)

    def cells(row: Row) -> list[str]:
        speed = (row.ms_median, row.ms_p20, row.ms_p80, row.images_per_s, row.tflops_per_s)
        return [*map(number, speed), f"{row.error:.1e}" if row.parity else f"[red]{row.error:.1e} RED[/red]"]

    _add_cases(table, rows, cells)
    return table


def _ratios_table(rows: list[Row]) -> Table:
    """Like against like: the plain ditfast over plain rivals, the one under a CUDA graph over those under a graph."""
    own = [row for row in rows if row.rival.startswith("ditfast") and row.speedup_over]
    kinds = list(dict.fromkeys(kind_of(rival) for row in own for rival in like(row)))
    table = Table(title="Times faster than the rival", title_justify="left", caption="Median of each round's ratio.")
    for column in ("model", "dtype", "batch", ""):
        table.add_column(column, no_wrap=True)
    for kind in kinds:
        table.add_column(f"over {kind}", justify="right")
    for row in own:
        ratios = {kind_of(rival): f"{ratio:.2f}" for rival, ratio in like(row).items()}
        table.add_row(row.model, row.dtype, str(row.batch), row.rival, *(ratios.get(kind, "") for kind in kinds))
    return table


def _costs_table(rows: list[Row]) -> Table:
    on_gpu = any(row.peak_memory_gb is not None for row in rows)
    caption = "1st: the first call, which compiles, packs or captures."
    if on_gpu:
        caption += (
            " Launches: kernels of a forward. GB: weights, activations, workspaces. MHz: of the multiprocessors, at work."
        )
    table = _case_table("Beside its time", caption)
    for column in ("1st, s", "launches", "GB", "J/image", "W", "MHz") if on_gpu else ("1st, s",):
        table.add_column(column, justify="right", no_wrap=True)

    def cells(row: Row) -> list[str]:
        costs = (row.first_call_s, row.launches, row.peak_memory_gb, row.joules_per_image, row.watts, row.clock_mhz)
        return [number(value) for value in (costs if on_gpu else costs[:1])]

    _add_cases(table, rows, cells)
    return table


def _roofline_table(rows: list[Row]) -> Table:
    caption = (
        "Floor: the least time of the fused data flow at the data sheet's peaks, and at what this GPU was measured to reach."
    )
    table = _case_table("Share of the roofline", caption)
    for column in ("floor, ms", "share", "measured floor, ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)

    def cells(row: Row) -> list[str]:
        measured = (number(row.floor_ms_measured), _percent(row.roofline_share_measured))
        return [number(row.floor_ms), _percent(row.roofline_share), *measured]

    _add_cases(table, rows, cells)
    return table


def _case_table(title: str, caption: str) -> Table:
    table = Table(title=title, title_justify="left", caption=caption)
    for column in ("model", "dtype", "batch", "rival"):
        table.add_column(column, no_wrap=True)
    return table


def _add_cases(table: Table, rows: list[Row], cells: Callable[[Row], list[str]]) -> None:
    """A section for each case, which is named once."""
    previous = None
    for row in rows:
        case = (row.model, row.dtype, str(row.batch))
        if previous not in (None, case):
            table.add_section()
        head = case if case != previous else ("", "", "")
        previous = case
        table.add_row(*head, row.rival, *cells(row), style="bold" if row.rival.startswith("ditfast") else None)


def like(row: Row) -> dict[str, float]:
    """A row's ratios to others' rivals that run as it does: both under a CUDA graph, or neither."""
    graphed = row.rival.endswith(GRAPH)
    return {
        rival: ratio
        for rival, ratio in row.speedup_over.items()
        if rival.endswith(GRAPH) == graphed and kind_of(rival) not in OWN
    }


def save_json(path: Path, environment: dict[str, Any], rows: Sequence[Any], notes: list[str]) -> Path:
    """Rows are dataclasses'."""
    report = {"environment": environment, "rows": [dataclasses.asdict(row) for row in rows], "notes": notes}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A bench.json: environment, rows, notes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
        report["environment"]["device"], report["rows"], report["notes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: got no bench.json ({error!r}), expected what benchmarks/bench.py writes") from error
    return report


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.1 else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
