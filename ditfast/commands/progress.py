"""A live line: how many images, how many a second, how long still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..sampling.ranks import Ranks

_SPEED_WINDOW = 300.0  # seconds: a large model's step takes many


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(
            "" if task.speed is None else f"{task.speed * task.fields['world']:.3g} images/s", style="progress.data.speed"
        )


@contextmanager
def image_progress(doing: str, images: int, ranks: Ranks) -> Iterator[Callable[[float], None]]:
    """Gives what advances it, by images or parts of one; on a terminal the first rank shows its share, and all ranks' speed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} images"),
        _Speed(),
        TimeRemainingColumn(),
    )
    description = doing if ranks.world == 1 else f"{doing}, rank 0 of {ranks.world}"
    console = Console(stderr=True)
    quiet = ranks.rank > 0 or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet, speed_estimate_period=_SPEED_WINDOW) as progress:
        task = progress.add_task(description, total=images, world=ranks.world)
        yield lambda amount: progress.advance(task, amount)
