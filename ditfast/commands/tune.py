"""``ditfast tune``"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..config import CONDITIONINGS, MODEL_NAMES, DiTConfig
from ..devices import DeviceError, find_gpu
from ..dispatch import tuning_cache
from ..dispatch.shapes import SIZES, OpShape
from ..dtypes import DTYPES
from ..interrupt import keeping
from ..sampling.ranks import Ranks
from ..terminal import fold, make_console, new_table, print_table, say, track_progress
from ..tuning.collect import model_shapes
from ..tuning.graph_timer import GraphTimer, Timer
from ..tuning.measure import Measured
from ..tuning.save import save
from ..tuning.tune import one_a_bucket, tune
from .arguments import batch_size, ended, image_size, positive

NAME = "tune"
HELP = "measure every implementation of a model's ops on this GPU, and remember the fastest"
DESCRIPTION = """Measures each op of the models' forwards on this GPU, in every backend and kernel config, and stores which
are fastest: ditfast takes them from then on. Without it a table of defaults decides. A short budget goes to what has most
work."""
EXAMPLES = """examples:
  ditfast tune                                    DiT-XL/2 in bf16, batches of 1, 8 and 32
  ditfast tune --model DiT-B/4 --batch 64 --budget 60
  ditfast tune --training --batch 128             a step of training, under autocast
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", choices=MODEL_NAMES, default=["DiT-XL/2"], metavar="NAME", help="default: DiT-XL/2"
    )
    parser.add_argument(
        "--conditioning", choices=CONDITIONINGS, metavar="KIND", default="adaln_zero", help="default: %(default)s"
    )
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
    return measure(args, GraphTimer(device), tuning_cache.versions_of(torch.cuda.get_device_name(device)))


def measure(args: argparse.Namespace, timer: Timer, versions: Mapping[str, str]) -> int:
    """On the timer's device, whose tuning cache is of these versions."""
    path = tuning_cache.path_of(versions["device"])
    if path is None:
        return ended(NAME, Ranks(), f"{tuning_cache.VARIABLE}={tuning_cache.OFF}: nowhere to store what would be measured", 2)
    try:
        shapes = one_a_bucket(_shapes(args))
    except ValueError as error:
        return ended(NAME, Ranks(), str(error), 2)
    stored: set[OpShape] = set()

    def remember(entries: Mapping[OpShape, tuning_cache.Entry]) -> None:
        save(path, versions, entries)
        stored.update(entries)

    with keeping(lambda: f"{len(stored)} of {len(shapes)} shapes are in {path}"), _progress() as show:
        try:
            found = tune(shapes, timer, args.budget, remember, show)
        except OSError as error:
            return ended(NAME, Ranks(), f"{path}: {error.strerror or error}", 1)
    _report(found, path)
    return 0 if any(one.ms for one in found) else 1


def _shapes(args: argparse.Namespace) -> Iterator[tuple[OpShape, int]]:
    for name in args.model:
        config = DiTConfig.from_name(name, image_size=args.image_size, conditioning=args.conditioning)
        for batch in args.batch:
            yield from model_shapes(config, batch, DTYPES[args.dtype], args.training).items()


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    with track_progress(NAME, None) as progress:
        yield progress.update


def _report(found: Sequence[Measured], path: Path) -> None:
    console = make_console()
    table = new_table("op", "rows", "sizes", "takes", "kernel configs", right=("us", "torch, us", "ratio"))
    for one in found:
        if not one.ms:
            continue
        best, plain = one.ms[one.winner], one.ms[one.plain]
        configs = "; ".join("x".join(map(str, config)) for config in one.configs.values()) if one.winner == "triton" else ""
        table.add_row(
            *_named(one.shape), one.winner, configs, f"{1e3 * best:.4g}", f"{1e3 * plain:.4g}", f"{plain / best:.2f}x"
        )
    print_table(table, console, "Fastest")
    for line in fold((" ".join(_named(one.shape)), line) for one in found for line in _remarks(one)):
        say(line, console)
    say(f"{sum(bool(one.ms) for one in found)} of {len(found)} shapes are in {path}", console)


def _remarks(one: Measured) -> list[str]:
    return [*(f"{backend} excluded: {why}" for backend, why in one.excluded.items()), *one.notes]


def _named(shape: OpShape) -> tuple[str, str, str]:
    sizes = " ".join(f"{name}={size}" for name, size in zip(SIZES[shape.op], shape.sizes, strict=True))
    return f"{shape.op}, in training" if shape.training else shape.op, str(shape.rows), sizes
