"""A live line of a training run; where there is no terminal, a line of text every half a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..training.speed import Speed
from ..training.step import StepReport

SMOOTHING = 0.95
LINE_EVERY = 30.0  # seconds

OnStep = Callable[[StepReport, int, Speed], None]


@contextmanager
def training_progress(steps: int, rank: int) -> Iterator[OnStep]:
    """Gives what to call after each step; the first rank shows."""
    console = Console(stderr=True)
    if rank or not console.is_terminal:
        yield _Lines(steps) if rank == 0 else lambda report, done, speed: None
        return
    columns = (
        TextColumn("loss {task.fields[loss]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("train", total=steps, loss="", speed="")
        smoothed = _Smoothed()

        def on_step(report: StepReport, done: int, speed: Speed) -> None:
            progress.update(task, completed=done, loss=smoothed.text(report), speed=_text(speed))

        yield on_step


class _Smoothed:
    """The loss, averaged over about the last twenty steps."""

    def __init__(self) -> None:
        self.loss = math.nan

    def text(self, report: StepReport) -> str:
        loss = report.parts["loss"]
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        return f"{self.loss:.4f}"


class _Lines:
    def __init__(self, steps: int):
        self.steps, self.smoothed, self.last = steps, _Smoothed(), -math.inf

    def __call__(self, report: StepReport, done: int, speed: Speed) -> None:
        loss, now = self.smoothed.text(report), time.monotonic()
        if now - self.last >= LINE_EVERY or done == self.steps:
            self.last = now
            print(f"step {done} of {self.steps}: loss {loss}, {_text(speed)}", flush=True)


def _text(speed: Speed) -> str:
    return f"{speed.images_per_s:.3g} images/s, MFU {speed.mfu:.0%}, {speed.memory / 1e9:.1f} GB"
