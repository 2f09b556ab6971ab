"""Reading of what a training run wrote about itself; a notebook shows it as a curve."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..argument_checks import as_path
from ..notebook import html_table, svg_curve
from .errors import RunError
from .log import RunLog


class History:
    """Logs of a run, also of one that still runs or was killed.

    Attributes:
        folder: of the run.
        log: a dict for each step: ``step``, ``loss`` and its parts, ``norm`` (of the gradient), ``rate``; None is a value that
            was infinite or NaN.
        timesteps: mean losses by tenths of the timesteps, each over a number of steps.
        evaluation: scores, where the run was evaluated.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.log, self.timesteps, self.evaluation = (_read(folder / f"{name}.jsonl") for name in RunLog.FILES)

    def __len__(self) -> int:
        return len(self.log)

    def __repr__(self) -> str:
        last = (self.log or [{}])[-1].items()
        values = "".join(f", {name} {value:.4g}" for name, value in last if value is not None)
        return f"History({str(self.folder)!r}, {len(self)} steps{values})"

    def _repr_html_(self) -> str:
        """Return the loss as a curve, the last step and the evaluations."""
        curve = svg_curve([line.get("loss") for line in self.log], f"{self.folder}: loss of {len(self)} steps")
        return curve + html_table(self.log[-1:]) + (html_table(self.evaluation) if self.evaluation else "")


def read_history(run: str | os.PathLike[str]) -> History:
    """Return the logs of a run's folder.

    Raises:
        RunError: no run has written there.
    """
    folder = as_path("run", run)
    if not (folder / "log.jsonl").is_file():
        raise RunError(f"{folder}: got no log.jsonl, expected the folder of a training run")
    return History(folder)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return whole lines; a run that is killed may leave half of its last one."""
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
