"""Progress of a training run: its loss, averaged, and its speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..files import format_bytes
from ..terminal import track_progress
from ..training.speed import Speed
from ..training.step import StepReport

SMOOTHING = 0.95  # about the last twenty steps

OnStep = Callable[[StepReport, int, Speed], None]


@contextmanager
def training_progress(steps: int, rank: int) -> Iterator[OnStep]:
    """Give what to call after each step; the first rank shows."""
    smoothed = math.nan
    with track_progress("training", steps, "steps", quiet=rank > 0) as progress:

        def on_step(report: StepReport, done: int, speed: Speed) -> None:
            nonlocal smoothed
            loss = report.parts["loss"]
            if math.isfinite(loss):
                smoothed = loss if math.isnan(smoothed) else SMOOTHING * smoothed + (1 - SMOOTHING) * loss
            progress.update(f"loss {smoothed:.4f}, {_text(speed)}", done)

        yield on_step


def _text(speed: Speed) -> str:
    return f"{speed.images_per_s:.3g} images/s, MFU {speed.mfu:.0%}, {format_bytes(speed.memory)}"
