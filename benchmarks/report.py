"""Tables of forwards, at most 80 columns wide: a block per case, and what the rivals cost beside their time."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ditfast.terminal import fold, new_table, print_table, say

from .rivals import GRAPH, LOOSE_BAR, OURS, kind_of, loose
from .rows import Row

OWN = (*OURS, "ditfast-swapped")
COLUMNS = 80  # of a file or a pipe

Cell: TypeAlias = Callable[[Row], str | Text]


def print_tables(console: Console, rows: list[Row]) -> None:
    """Print every rival's speed, how many times faster ditfast is than each, and what a GPU tells beside."""
    print_speed(console, rows)
    print_beside_speed(console, rows)


def print_speed(console: Console, rows: list[Row]) -> None:
    """Print a block per case: its roofline bound, then each rival's speed."""
    for case_rows in cases(rows):
        print_table(_speed_table(case_rows), console, _title(case_rows))
        console.print()


def print_beside_speed(console: Console, rows: list[Row]) -> None:
    """Print ratios and costs of all cases, then what the columns mean."""
    for headline, make in (("How many times faster than", _ratios_table), ("Beside its time", _costs_table)):
        tables = [(case_rows, make(case_rows)) for case_rows in cases(rows)]
        if any(table.row_count for _, table in tables):
            say(headline, console, "bold")
        for case_rows, table in tables:
            if table.row_count:
                say(name_of(case_rows[0]), console)
                print_table(table, console)
        console.print()
    say(_legend(rows), console)


def text_of(rows: list[Row], notes: Sequence[str]) -> str:
    """Return the tables as a file has them."""
    console = Console(width=COLUMNS, file=io.StringIO(), record=True)
    print_tables(console, rows)
    print_notes(console, notes)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Print notes; what several cases say alike is one line."""
    for line in fold((case, message) for case, _, message in (note.partition(": ") for note in notes)):
        say(f"note: {line}", console)


def cases(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each case, in order."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.dtype, row.batch), []).append(row)
    return list(found.values())


def name_of(row: Row) -> str:
    return f"{row.model} {row.dtype} batch {row.batch}"


def _title(rows: list[Row]) -> str:
    row = next((row for row in rows if row.floor_ms or row.floor_ms_measured), rows[0])
    facts = [f"{row.gflops:.1f} GFLOPs an image", f"{row.parameters / 1e6:.1f} M parameters"]
    bounds = {"data sheet": row.floor_ms, "measured peaks": row.floor_ms_measured}
    known = [f"{number(bound)} ms ({name})" for name, bound in bounds.items() if bound is not None]
    title = f"{name_of(row)}: {', '.join(facts)}"
    return f"{title}\nroofline bound {', '.join(known)}" if known else title


def _speed_table(rows: list[Row]) -> Table:
    """Without the columns that hold nothing."""
    baseline = next((row.rival for row in rows if row.rival == "eager"), None)
    columns: dict[str, Cell] = {
        "ms": lambda row: number(row.ms_median),
        "images/s": lambda row: number(row.images_per_s),
        "TFLOP/s": lambda row: number(row.tflops_per_s),
        "host us": lambda row: number(row.host_us),
        "share": lambda row: _percent(row.roofline_share or row.roofline_share_measured),
        "x eager": lambda row: _ratio(row, "eager" + GRAPH * row.rival.endswith(GRAPH)) if baseline else "",
        "error": lambda row: f"{row.error:.1e}" if row.parity else Text(f"{row.error:.1e} RED", "red"),
    }
    return _rivals_table(rows, columns)


def _ratios_table(rows: list[Row]) -> Table:
    """Like against like: the plain ditfast over plain rivals, the one under a CUDA graph over those under a graph."""
    own = [row for row in rows if row.rival.startswith("ditfast") and like(row)]
    kinds = list(dict.fromkeys(kind_of(rival) for row in own for rival in like(row)))
    columns: dict[str, Cell] = {}
    for kind in kinds:
        columns[kind.replace("-", "-\n")] = lambda row, kind=kind: _ratio(row, kind + GRAPH * row.rival.endswith(GRAPH))  # type: ignore[misc]
    return _rivals_table(own, columns)


def _costs_table(rows: list[Row]) -> Table:
    return _rivals_table(
        rows,
        {
            "p20 ms": lambda row: number(row.ms_p20),
            "p80 ms": lambda row: number(row.ms_p80),
            "1st s": lambda row: number(row.first_call_s),
            "launches": lambda row: number(row.launches),
            "GB": lambda row: number(row.peak_memory_gb),
            "J/image": lambda row: number(row.joules_per_image),
            "W": lambda row: number(row.watts),
            "MHz": lambda row: number(row.clock_mhz),
        },
    )


def _rivals_table(rows: list[Row], columns: dict[str, Cell]) -> Table:
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = [name for name, column in cells.items() if any(column)]
    table = new_table("", right=shown)
    for i, row in enumerate(rows):
        style = "bold" if row.rival.startswith("ditfast") else None
        table.add_row(row.rival, *(cells[name][i] for name in shown), style=style)
    return table


def _legend(rows: list[Row]) -> str:
    legend = (
        "ms, p20, p80: a forward of the batch. error: relative, against float64; RED: over the allowed one, not timed. "
        "x eager: median of the rounds' ratios. 1st s: the first call, which compiles, packs or captures; short if compiled "
        "ahead."
    )
    if any(loose(row.rival) for row in rows):
        legend += f"\nOpenVINO and int8 are held to {LOOSE_BAR}, not to eager PyTorch's error."
    if any(row.peak_memory_gb is not None for row in rows):
        legend += (
            "\nhost us: until the call returns, device idle before. share: roofline bound over ms. +graph: under a CUDA graph."
            " launches: kernels of a forward, at the first batch. GB: weights, activations, workspaces. MHz: multiprocessors,"
            " at work."
        )
    return legend


def like(row: Row) -> dict[str, float]:
    """Return a row's ratios to others' rivals that run as it does: both under a CUDA graph, or neither."""
    graphed = row.rival.endswith(GRAPH)
    return {
        rival: ratio
        for rival, ratio in row.speedup_over.items()
        if rival.endswith(GRAPH) == graphed and kind_of(rival) not in OWN
    }


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.4f}"


def _ratio(row: Row, rival: str) -> str:
    return f"{row.speedup_over[rival]:.2f}" if rival in row.speedup_over else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
