"""Predicted times, and what training takes, computed from shapes, data sheets and assumptions; nothing is run.

    python benchmarks/predictions.py --out docs/predictions.md         that page: forwards, steps, and all that is assumed
    python benchmarks/predictions.py --inference                       its part about forwards
    python benchmarks/predictions.py --summary                         the README's table
    python benchmarks/predictions.py --measured bench-results/bench.json
    python benchmarks/predictions.py --training                        the tables of docs/training.md
    python benchmarks/predictions.py --training --batch 16 --shards 64

Predicted times are those of ``ditfast.prediction``. --measured sets them beside what ``benchmarks/bench.py`` wrote on a GPU.
Under --training memory is what ``ditfast.flops.training_bytes`` adds up, time what ``ditfast.flops.floor_ms`` has as the least,
divided by the share of it that is assumed to be reached. All tables are Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ditfast import DiTConfig, flops
from ditfast.benchmarks import predicted_tables
from ditfast.benchmarks.markdown import head, row
from ditfast.benchmarks.predicted_tables import DTYPE, MODELS, config_of
from ditfast.files import whole_file
from ditfast.flops import DEVICES, DeviceSpec, floor_ms, training_bytes

PLANS = ("keep", "checkpoint")
TIMED = ("A100", "H100")
FLOORS = ("floor, ms", "checkpointed", "eager PyTorch")
REACHED = 0.5  # of the roofline: assumed
STEPS = 400_000
BACKWARD = 2  # times a forward's products, as MFU counts
DAY_MS = 24 * 60 * 60 * 1e3
PAGE = """\
# Predicted times

`python benchmarks/predictions.py --out docs/predictions.md` writes this page: 12 models, and DiT-XL/2 at 512 pixels, on five
devices.

**Predicted, not measured: nothing below was run on a GPU.** A kernel takes as long as the slowest of its bytes, its products
and its instructions, on the multiprocessor that has most of its tiles; a model is the sum of its kernels. The assumptions are
at the end; memory and floors of training are in [training.md](training.md)."""


def main(argv: Sequence[str] | None = None) -> int:
    args, parser = parse_arguments(argv)
    try:
        text = "\n\n".join(blocks(args)) + "\n"
        if args.out is None:
            print(text, end="")
        else:
            with whole_file(args.out) as temporary:
                temporary.write_text(text, "utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--inference", action="store_true", help="predicted times of forwards, and what is assumed")
    what.add_argument("--training", action="store_true", help="memory and floors of training, bf16")
    what.add_argument("--summary", action="store_true", help="a few models on one device")
    what.add_argument(
        "--measured", type=Path, metavar="JSON", help="predicted beside measured, of a file of benchmarks/bench.py"
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="a file instead of stdout")
    parser.add_argument(
        "--batch", type=_positive, default=32, metavar="N", help="of --training: images on a GPU; default %(default)s"
    )
    parser.add_argument(
        "--shards",
        type=_positive,
        default=8,
        metavar="N",
        help="of --training: GPUs of FSDP; default %(default)s",
    )
    return parser.parse_args(argv), parser


def blocks(args: argparse.Namespace) -> Iterator[str]:
    """Paragraphs and tables."""
    if args.training:
        yield "\n".join(memory_table(args.batch, args.shards))
        yield from ("\n".join(time_table(args.batch, device)) for device in TIMED)
    elif args.summary:
        yield from predicted_tables.summary()
    elif args.measured is not None:
        yield from predicted_tables.beside_measured(args.measured)
    elif args.inference:
        yield from (*predicted_tables.inference(), *predicted_tables.assumptions())
    else:
        yield from (PAGE, *predicted_tables.inference(), *predicted_tables.training(), *predicted_tables.assumptions())


def memory_table(batch: int, shards: int) -> Iterator[str]:
    """Gigabytes (10^9 bytes) on each GPU."""
    pairs = ("activations", "all, DDP", f"all, FSDP of {shards}")
    yield from head("computed, GB", "parameters, M", "state", *(name for first in pairs for name in (first, "checkpointed")))
    for name in MODELS:
        config = config_of(name)
        sizes = [training_bytes(config, batch, DTYPE, plan, shards=count) for count in (1, shards) for plan in PLANS]
        keep, checkpoint, *_ = sizes
        state = keep.weights + keep.gradients + keep.moments + keep.averages
        values = [state, keep.activations, checkpoint.activations, *(size.total for size in sizes)]
        yield row(name, f"{flops.parameters(config) / 1e6:.1f}", *(f"{value / 1e9:.1f}" for value in values))


def time_table(batch: int, device: str) -> Iterator[str]:
    """Of steps with ``batch`` images on each GPU."""
    yield from head(f"computed, {device}", *FLOORS, f"{REACHED:.0%} of it, ms", "MFU then", "images/s", "days")
    for name in MODELS:
        yield row(name, *_times(config_of(name), batch, DEVICES[device]))


def _times(config: DiTConfig, batch: int, device: DeviceSpec) -> Iterator[str]:
    keep, checkpoint = (floor_ms(config, batch, DTYPE, device, plan) for plan in PLANS)
    eager = floor_ms(config, batch, DTYPE, device, "keep", fused=False)
    step = keep / REACHED
    mfu = (1 + BACKWARD) * flops.flops(config) * batch / (1e-3 * step * device.peak(DTYPE))
    yield from (f"{value:.1f}" for value in (keep, checkpoint, eager, step))
    yield from (f"{mfu:.0%}", f"{1e3 * batch / step:.0f}", f"{STEPS * step / DAY_MS:.2f}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
