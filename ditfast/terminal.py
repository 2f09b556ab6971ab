"""Text, tables and progress of all commands and benches: as wide as the terminal, and plain lines where there is none."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import IO

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

PIPED_COLUMNS = 10_000  # nothing is wrapped
FIRST_LINE_S, LINE_EVERY_S = 10.0, 30.0  # of progress, where there is no terminal
SPEED_WINDOW_S = 300.0  # a large model's step takes many
MOST_SUBJECTS = 3  # that a line names
CTRL_C_COLUMNS = len("^C^C")  # which terminals write behind a bar: one more line would be left of it
GAP = 2  # characters between columns


_consoles_of_bars: list[Console] = []


class _Console(Console):
    """A console whose lines stand above another console's bar, as those that ``print`` writes do."""

    def _stream(self) -> IO[str]:
        if _consoles_of_bars and self not in _consoles_of_bars and self._file is None:
            return sys.stderr if self.stderr else sys.stdout  # which rich has put in their place
        return Console.file.fget(self)  # type: ignore[attr-defined]

    file = property(_stream, Console.file.fset)  # type: ignore[attr-defined]


def make_console(*, stderr: bool = False, piped: int = PIPED_COLUMNS) -> Console:
    """Return a console for stdout or stderr, without colors under ``NO_COLOR``.

    Args:
        stderr: takes that stream.
        piped: width where there is no terminal, unless ``COLUMNS`` says otherwise.
    """
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not (is_terminal(console) or console.is_jupyter or os.environ.get("COLUMNS", "").isdecimal()):
        console.width = piped
    return console


def is_terminal(console: Console) -> bool:
    """True if somebody watches; ``FORCE_COLOR`` alone makes no terminal of a pipe."""
    return console.is_terminal and console.file.isatty()


def say(text: str, console: Console | None = None, style: str | None = None) -> None:
    """Print text in lines as wide as the console; a word is never broken.

    Args:
        text: without markup.
        console: stdout unless given.
        style: of rich, as "bold".
    """
    console = make_console() if console is None else console
    for line in text.splitlines() or [""]:
        wrapped = textwrap.wrap(line, console.width, break_long_words=False, break_on_hyphens=False)
        console.print(Text("\n".join(wrapped), style or ""), soft_wrap=True)


def print_line(text: str) -> None:
    """Print a line on stderr at once, above a progress bar if there is one, from any thread; a terminal wraps it."""
    if _consoles_of_bars:
        _consoles_of_bars[-1].print(Text(text), soft_wrap=True)
    else:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal: paragraphs are filled, and examples that are too long get their comments below them."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_prose, group in itertools.groupby(text.splitlines(), lambda line: line[:1].strip() != ""):
            block = list(group)
            if is_prose and max(map(len, block)) > width:
                lines += textwrap.wrap(" ".join(block), width, break_long_words=False, break_on_hyphens=False)
            else:
                lines += itertools.chain.from_iterable(_example(line, width) for line in block)
        return "\n".join(indent + line for line in lines)


def _example(line: str, width: int) -> Iterator[str]:
    """Yield an example, if it is too long on lines that continue it, and then what it says behind two spaces or more."""
    if len(line) <= width:
        yield line
        return
    margin = line[: len(line) - len(line.lstrip())]
    command, _, comment = line.strip().partition("  ")
    options = re.sub(" (?!-)", "\0", command)  # each with its values a word
    parts = textwrap.wrap(options, width - len(margin) - 6, break_long_words=False, break_on_hyphens=False)
    for i, part in enumerate(parts):
        yield margin + "    " * (i > 0) + part.replace("\0", " ") + " \\" * (i < len(parts) - 1)
    below = margin + "    "
    yield from textwrap.wrap(comment.strip(), width, initial_indent=below + "# ", subsequent_indent=below + "# ")


# ---------------------------------------------------------------------------------------------------- tables
def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return a table without lines.

    Args:
        columns: left-aligned, the first of which names the row.
        right: columns after those, right-aligned.
    """
    table = Table(*columns, box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    for column in right:
        table.add_column(column, justify="right")
    return table


def print_table(table: Table, console: Console, title: str = "") -> None:
    """Print a table no wider than the console: one with many wrapped cells, or with long words, as a block of text a row.

    Args:
        table: of ``new_table``; its cells are text.
        console: to print to.
        title: of the table.
    """
    if title:
        say(title, console, "bold")
    blocks = list(_blocks(table, console.width))
    widths = _fit(table, console)
    if widths is not None:
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
        if len(console.render_lines(table)) <= len(blocks) + 1:
            console.print(table)
            return
    for line in blocks:
        console.print(line, soft_wrap=True)


def _fit(table: Table, console: Console) -> list[int] | None:
    """Return a width for each column, in which no word and no figure is broken; None if there is none."""
    ranges = [_measure(column, console) for column in table.columns]
    spare = console.width - GAP * (len(ranges) - 1) - sum(found.minimum for found in ranges)
    if spare < 0:
        return None
    widths = [found.minimum for found in ranges]
    by_need = sorted(range(len(ranges)), key=lambda i: ranges[i].span)
    for k, i in enumerate(by_need):
        widths[i] += min(ranges[i].span, spare // (len(by_need) - k))
        spare -= widths[i] - ranges[i].minimum
    return widths


def _measure(column: Column, console: Console) -> Measurement:
    options = console.options.update(width=PIPED_COLUMNS)
    header = Measurement.get(console, options, column.header)
    cells = [Measurement.get(console, options, cell) for cell in column.cells]
    least = max((one.maximum if column.justify == "right" else one.minimum for one in cells), default=0)
    return Measurement(max(header.minimum, least), max([header.maximum, *(one.maximum for one in cells)]))


def _blocks(table: Table, width: int) -> Iterator[Text]:
    """Yield the first cell of each row, then its others behind their headers on the lines below."""
    headers = [str(column.header).replace("\n", "") for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    for row, cells in zip(table.rows, rows, strict=True):
        name, *values = (cell.plain if isinstance(cell, Text) else str(cell) for cell in cells)
        items = (f"{header} {value}".strip() for header, value in zip(headers[1:], values, strict=True) if value)
        yield Text(name, row.style or "bold")
        yield from (Text(" " * GAP + line, row.style or "") for line in _filled(list(items), width - GAP))


def _filled(items: Sequence[str], width: int) -> list[str]:
    """Return lines of items with semicolons between them; an item is broken only where it takes more than a line."""
    lines: list[str] = []
    for i, item in enumerate(items):
        text = item + ";" * (i < len(items) - 1)
        if lines and len(lines[-1]) + 1 + len(text) <= width:
            lines[-1] += " " + text
        else:
            lines += textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return lines


# ---------------------------------------------------------------------------------------------------- repeated messages
def fold(messages: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each message, ``subject: message``, with its subjects, or one of them and how many more there are.

    Args:
        messages: pairs of a subject and a message, which may be empty.
    """
    subjects: dict[str, list[str]] = {}
    for subject, message in messages:
        subjects.setdefault(message or subject, []).extend([subject] if message else [])
    return [": ".join(filter(None, (_joined(found), message))) for message, found in subjects.items()]


def _joined(names: Sequence[str]) -> str:
    if len(names) > MOST_SUBJECTS:
        return f"{names[0]} and {len(names) - 1} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


# ---------------------------------------------------------------------------------------------------- progress
class Tracker:
    """Work done of a total, as ``track_progress`` shows it."""

    def __init__(self, bar: _Bar, doing: str, total: float | None, unit: str, ranks: int, lines: bool):
        self.doing, self.unit = doing, unit
        self._bar, self._start, self._next = bar, time.monotonic(), FIRST_LINE_S if lines else float("inf")
        self._task = bar.add_task(doing, total=total, unit=unit, ranks=ranks, text="")

    def advance(self, amount: float = 1) -> None:
        """Add to what is done."""
        self._bar.advance(self._task, amount)
        self._print_line()

    def update(self, text: str | None = None, done: float | None = None, total: float | None = None) -> None:
        """Change what is given.

        Args:
            text: shown below the bar.
            done: of the total.
            total: of the task.
        """
        if text is not None:
            self._bar.tasks[0].fields["text"] = text
        self._bar.update(self._task, completed=done, total=total)
        self._print_line()

    def _print_line(self) -> None:
        """Print a line where no bar is shown and the last one is old."""
        seconds = time.monotonic() - self._start
        if seconds >= self._next:
            self._next = seconds + LINE_EVERY_S
            task = self._bar.tasks[0]
            parts = (f"{self.doing} {_done(task)}", _speed(task), str(timedelta(seconds=round(seconds))), task.fields["text"])
            self._bar.console.print(Text(", ".join(filter(None, parts))), soft_wrap=True)


@contextmanager
def track_progress(
    doing: str, total: float | None, unit: str = "", *, ranks: int = 1, quiet: bool = False, console: Console | None = None
) -> Iterator[Tracker]:
    """Show a bar on a terminal and in a notebook (by rich, where ipywidgets is installed), and elsewhere a line now and then.

    Args:
        doing: in a word or two.
        total: of what is to be done; None is unknown as yet.
        unit: of the total, in the plural; speed and remaining time are shown for it.
        ranks: that work on as much each; all of them make the speed.
        quiet: shows nothing, as ranks but the first do.
        console: stderr unless given.
    """
    console = make_console(stderr=True) if console is None else console
    live = not quiet and _shows_bars(console)
    clock = (_Speed(), TimeRemainingColumn()) if unit else (TimeElapsedColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), _Done(), *clock)
    with (
        _Bar(
            *columns,
            console=console,
            transient=True,
            disable=not live,
            speed_estimate_period=SPEED_WINDOW_S,
            redirect_stdout=console.is_jupyter or sys.stdout.isatty(),
        ) as bar,
        _above(console, live),
    ):
        yield Tracker(bar, doing, total, unit, ranks, lines=not live and not quiet)


@contextmanager
def _above(console: Console, live: bool) -> Iterator[None]:
    """Give ``print_line`` the console of a bar, which knows where the bar is."""
    if not live:
        yield
        return
    _consoles_of_bars.append(console)
    try:
        yield
    finally:
        _consoles_of_bars.remove(console)


def _shows_bars(console: Console) -> bool:
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return is_terminal(console) and not console.is_dumb_terminal


class _Bar(Progress):
    """Bars of rich with their texts on a line of their own, where they are not cut off."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:  # none as yet where rich asks before there is a console
            width = max(1, self.console.width - CTRL_C_COLUMNS)
            yield Constrain(self.make_tasks_table([task]), width)
            if task.fields["text"]:
                yield Constrain(Text(task.fields["text"]), width)


class _Done(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_done(task), style="progress.download", no_wrap=True)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_speed(task), style="progress.data.speed", no_wrap=True)


def _done(task: Task) -> str:
    total = "" if task.total is None else f"/{task.total:.0f}"
    return f"{task.completed:.0f}{total} {task.fields['unit']}".strip()


def _speed(task: Task) -> str:
    unit, speed = task.fields["unit"], task.finished_speed or task.speed
    return f"{speed * task.fields['ranks']:.3g} {unit}/s" if unit and speed else ""
