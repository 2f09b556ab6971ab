"""What a run leaves behind: a table to read, a JSON file to compute with, two plots to look at."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditfast.config import MODEL_NAMES
from ditfast.files import whole_file

from .timing import Row


def print_tables(console: Console, rows: list[Row]) -> None:
    """The models, every rival's speed, and how many times faster ditfast is than each rival."""
    for table in (_models_table(rows), _speed_table(rows), _ratios_table(rows)):
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
    table = Table(title="A forward of the batch", title_justify="left", caption="Error: against the float64 reference.")
    for column in ("model", "dtype", "batch", "rival"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "p20", "p80", "images/s", "TFLOP/s", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        case = (row.model, row.dtype, str(row.batch))
        if previous not in (None, case):
            table.add_section()
        head = case if case != previous else ("", "", "")
        previous = case
        speed = [_number(value) for value in (row.ms_median, row.ms_p20, row.ms_p80, row.images_per_s, row.tflops_per_s)]
        error = f"{row.error:.1e}" if row.parity else f"[red]{row.error:.1e} RED[/red]"
        table.add_row(*head, row.rival, *speed, error, style="bold" if row.rival.startswith("ditfast") else None)
    return table


def _ratios_table(rows: list[Row]) -> Table:
    """Like against like: the plain ditfast over plain rivals, the one under a CUDA graph over those under a graph."""
    own = [row for row in rows if row.rival.startswith("ditfast") and row.speedup_over]
    kinds = list(dict.fromkeys(rival.partition("+")[0] for row in own for rival in like(row)))
    table = Table(title="Times faster than the rival", title_justify="left", caption="Median of each round's ratio.")
    for column in ("model", "dtype", "batch", ""):
        table.add_column(column, no_wrap=True)
    for kind in kinds:
        table.add_column(f"over {kind}", justify="right", no_wrap=True)
    for row in own:
        ratios = {rival.partition("+")[0]: f"{ratio:.2f}" for rival, ratio in like(row).items()}
        table.add_row(row.model, row.dtype, str(row.batch), row.rival, *(ratios.get(kind, "") for kind in kinds))
    return table


def like(row: Row) -> dict[str, float]:
    """A row's ratios to the rivals that run as it does: both under a CUDA graph, or neither."""
    return {rival: ratio for rival, ratio in row.speedup_over.items() if ("+" in rival) == ("+" in row.rival)}


def save_json(path: Path, environment: dict[str, Any], rows: Sequence[Any], notes: list[str]) -> Path:
    """Rows are dataclasses'."""
    report = {"environment": environment, "rows": [dataclasses.asdict(row) for row in rows], "notes": notes}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return path


def save_plots(folder: Path, rows: list[Row]) -> list[Path]:
    """throughput.png and ratios.png of the paper's models, a panel for each batch size and dtype."""
    timed = [row for row in rows if row.ms_median is not None and row.model.partition("@")[0] in MODEL_NAMES]
    if not timed:
        return []
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight"})
    panels = list(dict.fromkeys((row.dtype, row.batch) for row in timed))
    paths = [folder / "throughput.png", folder / "ratios.png"]
    for path, draw in zip(paths, (_draw_throughput, _draw_ratios), strict=True):
        figure, axes = pyplot.subplots(len(panels), figsize=(9, 4.5 * len(panels)), squeeze=False, layout="constrained")
        for place, (dtype, batch) in zip(axes.flat, panels, strict=True):
            draw(place, [row for row in timed if (row.dtype, row.batch) == (dtype, batch)])
            place.set_title(f"{dtype}, batch {batch}, {timed[0].device}")
        figure.savefig(path)
        pyplot.close(figure)
    return paths


def _draw_throughput(axes: Any, rows: list[Row]) -> None:
    """Images a second over the work of one: colour is the patch size, line and marker the rival."""
    colours = {"2": "tab:blue", "4": "tab:orange", "8": "tab:green"}
    styles = dict(zip(dict.fromkeys(row.rival for row in rows), ("o:", "s--", "D-", "^:", "v--", "*-"), strict=False))
    for rival, style in styles.items():
        for patch, colour in colours.items():
            line = sorted((r.gmacs, r.images_per_s) for r in rows if r.rival == rival and _patch(r) == patch)
            if line:
                axes.plot(*zip(*line, strict=True), style, color=colour, markersize=5, label=f"{rival}, patch {patch}")
    axes.set(xscale="log", yscale="log", xlabel="GMACs an image (the paper's Gflops)", ylabel="images / s")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _draw_ratios(axes: Any, rows: list[Row]) -> None:
    """How many times faster ditfast is than each rival, a group of bars a model."""
    own = [row for row in rows if row.rival.startswith("ditfast")]
    models = list(dict.fromkeys(row.model for row in own))
    pairs = list(dict.fromkeys((row.rival, rival) for row in own for rival in like(row)))
    for i, (name, rival) in enumerate(pairs):
        width = 0.8 / len(pairs)
        ratios = {row.model: like(row)[rival] for row in own if row.rival == name and rival in like(row)}
        places = [models.index(model) - 0.4 + (i + 0.5) * width for model in ratios]
        axes.bar_label(axes.bar(places, list(ratios.values()), width, label=f"{name} over {rival}"), fmt="%.2f", fontsize=6)
    axes.axhline(1, color="black", linewidth=1)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(models)), models, fontsize=7, rotation=45 if len(models) > 8 else 0)
    axes.set(ylabel="times faster (median of each round's ratio)")
    if pairs:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _patch(row: Row) -> str:
    return row.model.partition("@")[0].rpartition("/")[2]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.1 else f"{value:.4f}"
