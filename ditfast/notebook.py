"""HTML that notebooks show: tables, and curves as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 640, 200  # pixels of a curve
MOST_POINTS = 400


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a column for each key; one that holds nothing in any row is left out."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if any(_cell(row.get(key)) for row in rows)]
    head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
    lines = ("".join(f"<td>{html.escape(_cell(row.get(key)))}</td>" for key in keys) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def html_lines(*lines: str) -> str:
    """Return paragraphs of plain text."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def svg_curve(values: Sequence[float | None], title: str) -> str:
    """Return a curve, of many values the means of neighbors, with its range in the title; those not finite are left out."""
    step = -(-len(values) // MOST_POINTS) or 1
    parts = [[v for v in values[i : i + step] if v is not None and math.isfinite(v)] for i in range(0, len(values), step)]
    points = [(i, sum(part) / len(part)) for i, part in enumerate(parts) if part]
    if not points:
        return html_lines(f"{title}: no values")
    least, most = min(y for _, y in points), max(y for _, y in points)
    x_scale, y_scale = WIDTH / max(1, len(parts) - 1), HEIGHT / ((most - least) or 1.0)
    drawn = " ".join(f"{x * x_scale:.1f},{HEIGHT - (y - least) * y_scale:.1f}" for x, y in points)
    return (
        f"{html_lines(f'{title}: {points[0][1]:.4g} to {points[-1][1]:.4g}, between {least:.4g} and {most:.4g}')}"
        f'<svg width="{WIDTH}" height="{HEIGHT}" style="background:white" role="img" aria-label="{html.escape(title)}">'
        f'<polyline points="{drawn}" fill="none" stroke="#1f77b4" stroke-width="1.5"/></svg>'
    )


def _cell(value: object) -> str:
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value)
