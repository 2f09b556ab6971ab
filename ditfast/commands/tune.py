"""``ditfast tune``"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..config import CONDITIONINGS, MODEL_NAMES, DiTConfig
from ..devices import DeviceError, find_gpu
from ..dtypes import DTYPES
from ..problem import SIZES, Problem
from ..sampling.ranks import Ranks
from ..tuning import record
from ..tuning.clock import Clock, GraphClock
from ..tuning.collect import problems
from ..tuning.measure import Measured
from ..tuning.tune import one_a_bucket, tune
from .arguments import batch_size, ended, image_size, positive

NAME = "tune"
HELP = "measure every implementation of a model's ops on this GPU, and remember the fastest"
DESCRIPTION = """Measures each op of the models' forwards on this GPU, in every implementation and tile, and stores which are
fastest: ditfast takes them from then on. Without it predictions decide. A short budget goes to what takes most time."""
EXAMPLES = """examples:
  ditfast tune                                    DiT-XL/2 in bf16, batches of 1, 8 and 32
  ditfast tune --model DiT-B/4 --batch 64 --budget 60
  ditfast tune --training --batch 128             a step of training, under autocast
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", choices=MODEL_NAMES, default=["DiT-XL/2"], metavar="NAME", help="default: DiT-XL/2"
    )
    parser.add_argument("--conditioning", choices=CONDITIONINGS, default="adaln_zero", help="default: %(default)s")
    parser.add_argument("--image-size", type=image_size, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--batch", nargs="+", type=batch_size, default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--training", action="store_true", help="steps of training instead of forwards")
    parser.add_argument("--budget", type=positive, default=300, metavar="SECONDS", help="default: 300")


def run(args: argparse.Namespace) -> int:
    try:
        device = find_gpu()
    except DeviceError as error:
        return ended(NAME, Ranks(), f"needs a GPU, but {error}", 2)
    torch.cuda.set_device(device)
    return measure(args, GraphClock(device), record.versions_of(torch.cuda.get_device_name(device)))


def measure(args: argparse.Namespace, clock: Clock, versions: Mapping[str, str]) -> int:
    """On the clock's device, whose record is of these versions."""
    path = record.path_of(versions["device"])
    if path is None:
        return ended(NAME, Ranks(), f"{record.VARIABLE}={record.OFF}: nowhere to store what would be measured", 2)
    try:
        posed = list(_problems(args))
    except ValueError as error:
        return ended(NAME, Ranks(), str(error), 2)
    with _progress() as show:
        try:
            found = tune(one_a_bucket(posed), clock, args.budget, lambda entries: record.save(path, versions, entries), show)
        except KeyboardInterrupt:
            return ended(NAME, Ranks(), f"interrupted; what was measured is in {path}", 130)
        except OSError as error:
            return ended(NAME, Ranks(), f"{path}: {error.strerror or error}", 1)
    _report(found, path)
    return 0 if any(one.ms for one in found) else 1


def _problems(args: argparse.Namespace) -> Iterator[tuple[Problem, int]]:
    for name in args.model:
        config = DiTConfig.from_name(name, image_size=args.image_size, conditioning=args.conditioning)
        for batch in args.batch:
            yield from problems(config, batch, DTYPES[args.dtype], args.training).items()


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        yield lambda doing, done, steps: progress.update(task, description=doing, completed=done, total=steps)


def _report(found: Sequence[Measured], path: Path) -> None:
    console = Console(width=None if Console().is_terminal else 160)
    table = Table("op", "rows", "sizes", "takes", "tiles", title="Fastest", title_justify="left")
    for heading in ("us", "torch, us", "ratio"):
        table.add_column(heading, justify="right")
    for one in found:
        if not one.ms:
            continue
        best, plain = one.ms[one.winner], one.ms[one.plain]
        tiles = "; ".join("x".join(map(str, tile)) for tile in one.tiles.values()) if one.winner == "triton" else ""
        table.add_row(
            *_named(one.problem), one.winner, tiles, f"{1e3 * best:.4g}", f"{1e3 * plain:.4g}", f"{plain / best:.2f}x"
        )
    console.print(table)
    for one in found:
        excluded = [f"{route} excluded: {why}" for route, why in one.excluded.items()]
        for line in (*excluded, *one.notes):
            console.print(f"{' '.join(_named(one.problem))}: {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{sum(bool(one.ms) for one in found)} of {len(found)} problems are in {path}", highlight=False, soft_wrap=True
    )


def _named(problem: Problem) -> tuple[str, str, str]:
    sizes = " ".join(f"{name}={size}" for name, size in zip(SIZES[problem.op], problem.sizes, strict=True))
    return f"{problem.op}, in training" if problem.training else problem.op, str(problem.rows), sizes
