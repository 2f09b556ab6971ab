"""``ditfast evaluate``"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..devices import default_device
from ..free_memory import MemoryShortage, enough_memory
from ..terminal import make_console, print_table, say, track_progress
from .compare import compare, compare_with_digits
from .errors import EvaluationError
from .image_set import open_images
from .inception import BYTES_PER_IMAGE, Inception
from .report import Report

EXAMPLES = """examples:
  ditfast evaluate samples --reference digits             8x8 digits against the real scans, on a classifier trained here
  ditfast evaluate samples --reference VIRTUAL_imagenet256_labeled.npz
  ditfast evaluate samples.npz --reference photographs --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="DIR", help="a folder of PNG files, or an .npz file in ADM's layout")
    parser.add_argument(
        "--reference",
        required=True,
        metavar="REF",
        help="digits: the real scans (a folder of that name is ./digits); else a folder, or an .npz file as of ADM's evaluator",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="its weights; never downloaded; default: where torch.hub keeps them"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="images that Inception sees at once; default %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Prints a table or JSON; 0, or 2 after one line on stderr about what came and what was expected."""
    try:
        report = _evaluate(args)
    except EvaluationError as error:
        print(f"ditfast evaluate: {error}", file=sys.stderr)
        return 2
    except MemoryShortage as error:
        print(f"ditfast evaluate: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        console = make_console()
        print_table(report.as_table(), console, report.heading())
        for note in report.notes:
            say(note, console)
    return 0


def _evaluate(args: argparse.Namespace) -> Report:
    images = open_images(args.images)
    if args.reference == "digits":
        return compare_with_digits(images)
    reference = open_images(Path(args.reference))
    device = default_device(args.prog)
    inception = Inception(args.inception, device)
    together = min(args.batch_size, max(len(images), len(reference)))
    what, advice = f"--batch-size: got {args.batch_size}", "take a smaller one"
    with (
        enough_memory(what, device, advice, least=together * BYTES_PER_IMAGE),
        track_progress("Inception", len(images) + len(reference), "images") as progress,
    ):
        return compare(images, reference, inception, args.batch_size, progress.advance)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)
