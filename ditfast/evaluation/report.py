"""What an evaluation found: scores, with what real images and noise would score where that is known."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from ..terminal import new_table, print_table

WIDTH = 120  # characters of a line where no terminal says how many


@dataclass(frozen=True)
class Score:
    key: str
    name: str
    better: str  # "lower" or "higher"
    value: float
    real: float | None = None  # what one half of the real images scores against the other
    noise: float | None = None


@dataclass(frozen=True, repr=False)
class Report:
    """Scores of ``count`` images against ``reference_count`` others, on a network's features; shows itself as a table."""

    images: str
    count: int
    reference: str
    reference_count: int
    network: str
    scores: list[Score]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers unrounded, scores by their keys; ``real`` and ``noise`` where they are known."""
        columns = {
            column: {score.key: value for score in self.scores if (value := getattr(score, attribute)) is not None}
            for column, attribute in (("scores", "value"), ("real", "real"), ("noise", "noise"))
        }
        facts = {name: getattr(self, name) for name in ("images", "count", "reference", "reference_count", "network")}
        return facts | {column: values for column, values in columns.items() if values} | {"notes": self.notes}

    def __repr__(self) -> str:
        text = io.StringIO()
        print_table(self.as_table(), Console(file=text, width=WIDTH))
        return "\n".join([self.heading(), text.getvalue().rstrip("\n"), *self.notes])

    def heading(self) -> str:
        return (
            f"{self.images}: {self.count:,} images against {self.reference}, {self.reference_count:,} images, by {self.network}"
        )

    def as_table(self) -> Table:
        scale = any(score.real is not None for score in self.scores)
        right = ("these images", *(("real, half against half", "noise") if scale else ()))
        table = new_table("score", "better", right=right)
        for score in self.scores:
            values = [score.value, *([score.real, score.noise] if scale else [])]
            table.add_row(score.name, score.better, *("" if value is None else _rounded(value) for value in values))
        return table


def _rounded(value: float) -> str:
    """Three decimals, of small values as many as show two digits."""
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
