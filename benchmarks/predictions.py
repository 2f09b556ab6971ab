"""What training takes, computed from shapes and data sheets; nothing is run.

    python benchmarks/predictions.py --training                        the tables of docs/training.md
    python benchmarks/predictions.py --training --batch 16 --shards 64

Memory is what ``ditfast.flops.training_bytes`` adds up, time what ``ditfast.flops.floor_ms`` has as the least, divided by the
share of it that is assumed to be reached. The tables are Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from ditfast import DiTConfig, flops
from ditfast.config import MODEL_NAMES
from ditfast.flops import DEVICES, DeviceSpec, floor_ms, training_bytes

MODELS = [*MODEL_NAMES, "DiT-XL/2@512"]
PLANS = ("keep", "checkpoint")
TIMED = ("A100", "H100")
FLOORS = ("floor, ms", "checkpointed", "eager PyTorch")
DTYPE = torch.bfloat16
REACHED = 0.5  # of the roofline: assumed
STEPS = 400_000
BACKWARD = 2  # times a forward's products, as MFU counts
DAY_MS = 24 * 60 * 60 * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    tables = [memory_table(args.batch, args.shards), *(time_table(args.batch, device) for device in TIMED)]
    print("\n\n".join("\n".join(table) for table in tables))
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--training", action="store_true", help="memory and time of training, bf16")
    parser.add_argument("--batch", type=_positive, default=32, metavar="N", help="images on a GPU; default %(default)s")
    parser.add_argument(
        "--shards", type=_positive, default=8, metavar="N", help="GPUs that FSDP shares over; default %(default)s"
    )
    return parser.parse_args(argv)


def memory_table(batch: int, shards: int) -> Iterator[str]:
    """Gigabytes (10^9 bytes) on each GPU."""
    pairs = ("activations", "all, DDP", f"all, FSDP of {shards}")
    yield from _head("computed, GB", "parameters, M", "state", *(name for first in pairs for name in (first, "checkpointed")))
    for name in MODELS:
        config = _config(name)
        sizes = [training_bytes(config, batch, DTYPE, plan, shards=count) for count in (1, shards) for plan in PLANS]
        keep, checkpoint, *_ = sizes
        state = keep.weights + keep.gradients + keep.moments + keep.averages
        values = [state, keep.activations, checkpoint.activations, *(size.total for size in sizes)]
        yield _row(name, f"{flops.parameters(config) / 1e6:.1f}", *(f"{value / 1e9:.1f}" for value in values))


def time_table(batch: int, device: str) -> Iterator[str]:
    """Of steps with ``batch`` images on each GPU."""
    yield from _head(f"computed, {device}", *FLOORS, f"{REACHED:.0%} of it, ms", "MFU then", "images/s", "days")
    for name in MODELS:
        yield _row(name, *_times(_config(name), batch, DEVICES[device]))


def _times(config: DiTConfig, batch: int, device: DeviceSpec) -> Iterator[str]:
    keep, checkpoint = (floor_ms(config, batch, DTYPE, device, plan) for plan in PLANS)
    eager = floor_ms(config, batch, DTYPE, device, "keep", fused=False)
    step = keep / REACHED
    mfu = (1 + BACKWARD) * flops.flops(config) * batch / (1e-3 * step * device.peak(DTYPE))
    yield from (f"{value:.1f}" for value in (keep, checkpoint, eager, step))
    yield from (f"{mfu:.0%}", f"{1e3 * batch / step:.0f}", f"{STEPS * step / DAY_MS:.2f}")


def _head(*columns: str) -> Iterator[str]:
    yield _row(*columns)
    yield "|---" * len(columns) + "|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _config(model: str) -> DiTConfig:
    name, _, pixels = model.partition("@")
    return DiTConfig.from_name(name, image_size=int(pixels or 256))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
