"""What a run writes about itself: JSON lines, the same whether it was killed and resumed or not, and TensorBoard's scalars."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import whole_file
from .board import Board


class JsonLines:
    """A file of JSON objects, one a line, each with its ``step``.

    Lines of steps after ``step``, and one that was cut off, are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
            kept = list(itertools.takewhile(lambda line: _step_of(line) <= step, lines))
            if len(kept) < len(lines):
                with whole_file(path) as temporary:
                    temporary.write_text("".join(kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Onto the disk, as a checkpoint that follows has to find it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class RunLog:
    """The logs of a run's folder; of every rank but the first, none.

    ``log.jsonl`` has a line a step, ``timesteps.jsonl`` the losses by timestep, ``evaluation.jsonl`` evaluations; they hold
    nothing that depends on the clock. Speed and memory go to TensorBoard, where that is installed.
    """

    FILES = ("log", "timesteps", "evaluation")

    def __init__(self, folder: Path, step: int, writes: bool):
        self._files = {name: JsonLines(folder / f"{name}.jsonl", step) for name in self.FILES} if writes else {}
        self._board = None
        if writes:
            with contextlib.suppress(ImportError):  # TensorBoard is not installed
                self._board = Board(folder / "tensorboard", step)

    def write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of a file, and its numbers as scalars."""
        if self._files:
            self._files[name].write({"step": step, **values})
        self.scalars(name, step, values)

    def scalars(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """For TensorBoard only."""
        if self._board is not None:
            self._board.scalars(step, dict(_numbers(name, values)))

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    """Infinite of a line that was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


def _numbers(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        for place, number in enumerate(value) if isinstance(value, list) else [("", value)]:
            if isinstance(number, (int, float)):
                yield f"{name}/{key}{place}", number
