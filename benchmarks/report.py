"""What a run leaves behind: a table to read, a JSON file to compute with, two plots to look at."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditfast.config import MODEL_NAMES

from .timing import Row


def print_table(console: Console, rows: list[Row]) -> None:
    """One line a rival, one block a case; ratios over 1 are how much faster the line is than the column's rival."""
    rivals = list(dict.fromkeys(row.rival for row in rows))
    table = Table(title="DiT forward", caption="GMACs: the paper's convention; 1 MAC = 2 FLOPs. Error: against float64.")
    table.add_column("model", no_wrap=True)
    table.add_column("rival", no_wrap=True)
    for column in ("dtype", "batch", "GMACs", "GFLOPs", "params M", "ms", "p20", "p80", "images/s", "TFLOP/s", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for rival in rivals:
        table.add_column(f"x {rival}", justify="right", no_wrap=True)
    previous = None
    for row in rows:
        case = (row.model, row.dtype, row.batch)
        if previous not in (None, case):
            table.add_section()
        head = (row.model,) if case != previous else ("",)
        previous = case
        size = (row.dtype, str(row.batch), f"{row.gmacs:.2f}", f"{row.gflops:.2f}", f"{row.parameters / 1e6:.1f}")
        speed = [_number(value) for value in (row.ms_median, row.ms_p20, row.ms_p80, row.images_per_s, row.tflops_per_s)]
        ratios = [f"{row.speedup_over[rival]:.2f}" if rival in row.speedup_over else "" for rival in rivals]
        error = f"{row.error:.1e}" if row.parity else f"[red]{row.error:.1e} RED[/red]"
        style = "bold" if row.rival.startswith("ditfast") else None
        table.add_row(*head, row.rival, *size, *speed, error, *ratios, style=style)
    console.print(table)


def save_json(path: Path, environment: dict[str, Any], rows: list[Row], notes: list[str]) -> Path:
    report = {"environment": environment, "rows": [dataclasses.asdict(row) for row in rows], "notes": notes}
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)
    return path


def save_plots(folder: Path, rows: list[Row]) -> list[Path]:
    """throughput.png and ratios.png, of the paper's models; nothing where matplotlib is missing or no model was timed."""
    timed = [row for row in rows if row.ms_median is not None and row.model.partition("@")[0] in MODEL_NAMES]
    if not timed:
        return []
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight"})
    paths = [folder / "throughput.png", folder / "ratios.png"]
    for path, draw in zip(paths, (_draw_throughput, _draw_ratios), strict=True):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        draw(axes, timed)
        figure.savefig(path)
        pyplot.close(figure)
    return paths


def _draw_throughput(axes: Any, rows: list[Row]) -> None:
    """Images a second over the work of one: a line a patch size and rival."""
    colours = {"2": "tab:blue", "4": "tab:orange", "8": "tab:green"}
    styles = dict(zip(dict.fromkeys(row.rival for row in rows), (":", "--", "-", "-.") * 2, strict=False))
    batch, dtype = rows[0].batch, rows[0].dtype
    chosen = [row for row in rows if (row.batch, row.dtype) == (batch, dtype)]
    for rival, style in styles.items():
        for patch, colour in colours.items():
            line = sorted((r.gmacs, r.images_per_s) for r in chosen if r.rival == rival and _patch(r) == patch)
            if line:
                axes.plot(
                    *zip(*line, strict=True), style, color=colour, marker="o", markersize=4, label=f"{rival}, patch {patch}"
                )
    axes.set(xscale="log", yscale="log", xlabel="GMACs an image (the paper's Gflops)", ylabel="images / s")
    axes.set_title(f"Throughput by patch size ({dtype}, batch {batch}, {rows[0].device})")
    axes.legend(fontsize=7, ncols=len(styles))


def _draw_ratios(axes: Any, rows: list[Row]) -> None:
    """How many times faster ditfast is than each rival, a group of bars a case."""
    own = [row for row in rows if row.rival == "ditfast" and row.speedup_over]
    rivals = list(dict.fromkeys(rival for row in own for rival in row.speedup_over))
    for i, rival in enumerate(rivals):
        width = 0.8 / len(rivals)
        places = [k - 0.4 + (i + 0.5) * width for k in range(len(own))]
        bars = axes.bar(places, [row.speedup_over.get(rival, 0.0) for row in own], width, label=f"over {rival}")
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1, color="black", linewidth=1)
    axes.margins(y=0.15)
    several = len({(row.dtype, row.batch) for row in own}) > 1
    names = [f"{row.model}\n{row.dtype} b{row.batch}" if several else row.model for row in own]
    axes.set_xticks(range(len(own)), names, fontsize=7, rotation=45 if len(own) > 8 else 0)
    axes.set(ylabel="speed of ditfast over the rival's", title="ditfast against each rival (median of each round's ratio)")
    if rivals:
        axes.legend(fontsize=8, loc="lower right")


def _patch(row: Row) -> str:
    return row.model.partition("@")[0].rpartition("/")[2]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.1 else f"{value:.4f}"
