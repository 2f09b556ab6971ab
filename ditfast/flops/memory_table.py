"""Memory of training on each GPU, as ``training_bytes`` computes it: the table of docs/training.md, in Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from ..config import MODEL_NAMES, DiTConfig
from .counts import parameters
from .memory import PLANS, training_bytes

CONFIGS = {name: DiTConfig.from_name(name) for name in MODEL_NAMES}
CONFIGS["DiT-XL/2@512"] = DiTConfig.from_name("DiT-XL/2", image_size=512)
COLUMNS = "| computed, GB | parameters, M | state | activations | checkpointed | all, DDP | checkpointed "


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images on a GPU; default %(default)s")
    parser.add_argument("--shards", type=int, default=8, metavar="N", help="GPUs of FSDP; default %(default)s")
    args = parser.parse_args(argv)
    try:
        print("\n".join(memory_table(args.batch, args.shards)))
    except ValueError as error:
        parser.error(str(error))
    return 0


def memory_table(batch: int, shards: int) -> Iterator[str]:
    """Yield the lines of the table, in gigabytes (10^9 bytes), for bf16 autocast."""
    yield f"{COLUMNS}| all, FSDP of {shards} | checkpointed |"
    yield f"|{'---|' * 9}"
    for name, config in CONFIGS.items():
        plans = [(plan, count) for count in (1, shards) for plan in PLANS[1:]]
        sizes = [training_bytes(config, batch, torch.bfloat16, plan, shards=count) for plan, count in plans]
        keep, checkpoint, *_ = sizes
        state = keep.weights + keep.gradients + keep.moments + keep.averages
        values = [state, keep.activations, checkpoint.activations, *(size.total for size in sizes)]
        cells = [name, f"{parameters(config) / 1e6:.1f}", *(f"{value / 1e9:.1f}" for value in values)]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
