"""``ditfast compile``"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from ..ahead import launches
from ..config import CONDITIONINGS, MODEL_NAMES, DiTConfig
from ..digits import DIGITS_CONFIG
from ..dtypes import DTYPES
from ..interrupt import keeping
from ..terminal import fold, make_console, new_table, print_table, say, track_progress
from .arguments import batch_size, image_size, positive

if TYPE_CHECKING:
    from ditfast.kernels.ahead import Build, Outcome

HELP = "a model's kernels into Triton's cache, on a machine without a GPU"
DESCRIPTION = """Compiles every Triton kernel that a model launches, so that its first step on a GPU compiles none: forwards,
guided or not, and the steps of all solvers, in the dtype given and under autocast to it. They go into Triton's cache
(TRITON_CACHE_DIR, else ~/.triton/cache), which the GPU's machine has to find, with the same versions of ditfast and triton.
Triton's own small C helper is built on that machine all the same."""
EXAMPLES = """examples:
  ditfast compile --arch sm_90 --model DiT-XL/2 --batch 1 8 32
  ditfast compile --arch sm_80 gfx942 --model DiT-XL/2 --image-size 512 --batch 8
  ditfast compile --arch sm_90 --model DiT-B/4 --batch 256 --dtype bf16 --training
  TRITON_CACHE_DIR=/opt/kernels ditfast compile --arch sm_90 --model digits --batch 64     in a container's build
"""
DIGITS = "digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        nargs="+",
        required=True,
        metavar="ARCH",
        help="targets: sm_80, sm_90, gfx942 and so on; a wrong one lists all",
    )
    parser.add_argument("--model", choices=[*MODEL_NAMES, DIGITS], required=True, metavar="NAME", help="as DiT-XL/2; or digits")
    parser.add_argument(
        "--conditioning", choices=CONDITIONINGS, metavar="KIND", default="adaln_zero", help="default %(default)s"
    )
    parser.add_argument("--image-size", type=image_size, default=256, metavar="N", help="pixels; default %(default)s")
    parser.add_argument(
        "--batch", type=batch_size, nargs="+", default=[1], metavar="N", help="images in a forward; guided, each is two samples"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default %(default)s")
    parser.add_argument("--training", action="store_true", help="training steps too: forward and backward of such a batch")
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="threads that compile; default %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    try:
        config = DIGITS_CONFIG if args.model == DIGITS else _named(args)
        found = [launches(config, arch, args.batch, DTYPES[args.dtype], args.training) for arch in dict.fromkeys(args.arch)]
    except (ValueError, RuntimeError) as error:
        print(f"ditfast compile: {error}", file=sys.stderr)
        return 2
    outcomes = _compiled([build for builds in found for build in builds], args.jobs)
    console = make_console()
    print_table(_table(outcomes), console, "Kernels in Triton's cache")
    say(_summary(outcomes, time.perf_counter() - start), console)
    failed = [outcome for outcome in outcomes if outcome.error]
    for line in fold((f"{outcome.build.name} for {outcome.build.arch}", _alike(outcome.error)) for outcome in failed):
        print(f"ditfast compile: {line}", file=sys.stderr)
    return int(bool(failed))


def _alike(error: str) -> str:
    """Return an error without the files of Triton's cache that it names, which are others for each kernel."""
    import triton

    return re.sub(rf"({re.escape(str(triton.knobs.cache.dir))})[^\s'\"]*", r"\1", error)


def _named(args: argparse.Namespace) -> DiTConfig:
    return DiTConfig.from_name(args.model, image_size=args.image_size, conditioning=args.conditioning)


def _compiled(builds: Sequence[Build], jobs: int) -> list[Outcome]:
    from ditfast.kernels.ahead import compile_all

    outcomes: list[Outcome] = []
    with keeping(lambda: _kept(outcomes, builds)), track_progress("compiling", len(builds), "kernels") as progress:
        for outcome in compile_all(builds, jobs):
            outcomes.append(outcome)
            progress.advance()
    return outcomes


def _kept(outcomes: Sequence[Outcome], builds: Sequence[Build]) -> str:
    import triton

    done = sum(not outcome.error for outcome in outcomes)
    return f"{done} of {len(builds)} kernels are in {triton.knobs.cache.dir}; the same command compiles the rest"


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = new_table("kernel", "target", right=("specialisations", "compiled now", "already there", "seconds"))
    for arch, name in dict.fromkeys((outcome.build.arch, outcome.build.name) for outcome in outcomes):
        own = [outcome for outcome in outcomes if (outcome.build.arch, outcome.build.name) == (arch, name)]
        cached = sum(outcome.cached for outcome in own)
        compiled = sum(not outcome.cached and not outcome.error for outcome in own)
        seconds = sum(outcome.seconds for outcome in own)
        table.add_row(name, arch, str(len(own)), str(compiled), str(cached), f"{seconds:.1f}")
    return table


def _summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    import triton

    cached, failed = sum(outcome.cached for outcome in outcomes), sum(bool(outcome.error) for outcome in outcomes)
    compiled = len(outcomes) - cached - failed
    what = f"{compiled} compiled, {cached} already there" + (f", {failed} FAILED" if failed else "")
    return f"{what}, in {triton.knobs.cache.dir}: {seconds:.0f} s"
