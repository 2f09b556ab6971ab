"""Results of benches as JSON: machine, versions, commit and rows, in one format for all of them.

A file holds an object with ``bench`` (which one wrote it), ``date``, ``commit``, ``command``, ``machine`` (device, threads,
clocks, precision settings, measured peaks), ``versions``, ``rows`` (the fields of that bench's row) and ``notes`` (text).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ditfast.commands.arguments import LARGEST_INT, integer
from ditfast.files import free_path, whole_file
from ditfast.notebook import html_lines, html_table

from . import environment


@dataclass
class Results:
    """Rows of a bench, and the machine, versions and commit that they are of."""

    bench: str
    date: str
    commit: str | None
    command: str | None
    machine: dict[str, Any]
    versions: dict[str, Any]
    rows: list[Any] = field(default_factory=list)  # dataclasses of the bench that runs; dicts if read from a file
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """Return machine, versions, commit and date on one line."""
        facts = {**self.machine, **self.versions, "commit": self.commit, "date": self.date}
        return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)

    def _repr_html_(self) -> str:
        """Return the rows as a table for a notebook, with the machine above and the notes below."""
        return html_lines(f"{self.bench}: {self.describe()}") + html_table(self.to_dict()["rows"]) + html_lines(*self.notes)

    def write(self, *paths: Path) -> None:
        """Write the same JSON to each path; it appears whole or not at all.

        Raises:
            OSError: a file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        for path in paths:
            with whole_file(path) as temporary:
                temporary.write_text(text, "utf-8")


def new_results(bench: str, device: torch.device, command: str | None = None) -> Results:
    """Return a bench's results without rows, of today on this machine."""
    date = datetime.now(timezone.utc).date().isoformat()
    return Results(bench, date, environment.commit(), command, environment.machine(device), environment.versions())


def read(path: str | os.PathLike[str]) -> Results:
    """Read what ``Results.write`` wrote, such as ``bench-results/bench.json``; other keys are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        results = Results(**{one.name: found[one.name] for one in dataclasses.fields(Results)})
        results.machine["device"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: got no results ({error!r}), expected what the benches of benchmarks/ write") from error
    return results


def results_path(device: str, date: str) -> Path:
    """Return a free path for results to keep: benchmarks/results/DEVICE-DATE.json, in the current folder outside a clone."""
    source = Path(__file__).resolve().parent
    parent = source / "results" if (source.parent / ".git").exists() else Path.cwd()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"
    return free_path(parent / f"{slug}-{date}.json")


def folder(text: str) -> Path:
    """Make the folder that an argument names."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder that can be written: {error}") from error
    return path


def new_folder(name: str) -> Callable[[str], Path]:
    """Return a type of argument for argparse: a folder, which is made, without a file ``name`` of an earlier run."""

    def parse(text: str) -> Path:
        path = folder(text)
        if (path / name).exists():
            raise argparse.ArgumentTypeError(
                f"got {text!r}, which has {name} of an earlier run: give another folder, or remove it"
            )
        return path

    return parse


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of argument for argparse: an integer that is no smaller."""
    return lambda text: integer(text, least, LARGEST_INT, f"an integer of at least {least}")


def rows_as(kind: type, results: Results, path: Path) -> Sequence[Any]:
    """Return the rows as dataclasses of this kind.

    Raises:
        ValueError: they have other fields.
    """
    try:
        return [kind(**row) for row in results.rows]
    except TypeError as error:
        raise ValueError(f"{path}: got rows of another version ({error}), expected those of a {kind.__name__}") from error
