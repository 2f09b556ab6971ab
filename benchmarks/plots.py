"""A run to look at: throughput over work, and how many times faster ditfast is than each rival."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditfast.config import MODEL_NAMES

from .report import like
from .rows import Row

STYLES = ("o:", "s--", "D-", "^:", "v--", "*-", "P-.", "X:", "<--", ">-.", "p:", "h--")  # of lines and markers


def save_plots(folder: Path, rows: list[Row]) -> list[Path]:
    """throughput.png and ratios.png of the paper's models, a panel for each batch size and dtype."""
    timed = [row for row in rows if row.ms_median is not None and row.model.partition("@")[0] in MODEL_NAMES]
    if not timed:
        return []
    panels = list(dict.fromkeys((row.dtype, row.batch) for row in timed))
    paths = [folder / "throughput.png", folder / "ratios.png"]
    for path, draw in zip(paths, (_draw_throughput, _draw_ratios), strict=True):
        with saved_figure(path, nrows=len(panels), figsize=(9, 4.5 * len(panels)), squeeze=False) as axes:
            for place, (dtype, batch) in zip(axes.flat, panels, strict=True):
                draw(place, [row for row in timed if (row.dtype, row.batch) == (dtype, batch)])
                place.set_title(f"{dtype}, batch {batch}, {timed[0].device}")
    return paths


@contextlib.contextmanager
def saved_figure(path: Path, **options: Any) -> Iterator[Any]:
    """Yield axes, made with these options of ``pyplot.subplots``; their figure is saved when the block ends."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight"})
    figure, axes = pyplot.subplots(layout="constrained", **options)
    yield axes
    figure.savefig(path)
    pyplot.close(figure)


def _draw_throughput(axes: Any, rows: list[Row]) -> None:
    """Images a second over the work of one: colour is the patch size, line and marker the rival."""
    colours = {"2": "tab:blue", "4": "tab:orange", "8": "tab:green"}
    styles = dict(zip(dict.fromkeys(row.rival for row in rows), itertools.cycle(STYLES), strict=False))
    for rival, style in styles.items():
        for patch, colour in colours.items():
            own = [row for row in rows if row.rival == rival and row.model.partition("@")[0].endswith(f"/{patch}")]
            line = sorted((row.gmacs, row.images_per_s) for row in own)
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
