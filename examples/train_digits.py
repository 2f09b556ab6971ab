"""Trains the checkpoint that ships as ditfast/data/digits.safetensors, on scikit-learn's 1,797 scanned 8x8 digits.

    python examples/train_digits.py --out ditfast/data/digits.safetensors

Needs scikit-learn (the [bench] and [test] extras bring it). Took 14 minutes on two busy cores; the seed fixes data and noise.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file

from ditfast import DiTConfig, reference
from ditfast.diffusion import NUM_TRAIN_STEPS, GaussianDiffusion
from ditfast.digits import real_digits

CONFIG = DiTConfig(
    depth=6, hidden_size=128, num_heads=4, patch_size=2, input_size=8, in_channels=1, num_classes=10, class_dropout_prob=0.1
)
BATCH = 128
PEAK_RATE = 1e-3
WARM_UP_STEPS = 200
EMA_DECAY = 0.999


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return PEAK_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(steps: int, seed: int) -> reference.DiT:
    torch.manual_seed(seed)
    images, labels = real_digits()
    model = reference.DiT(CONFIG).train()
    ema = copy.deepcopy(model).eval()
    diffusion = GaussianDiffusion()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("train", total=steps, loss=math.nan)
        smooth = math.nan
        for step in range(steps):
            batch = torch.randint(len(images), (BATCH,))
            t = torch.randint(NUM_TRAIN_STEPS, (BATCH,))
            loss = diffusion.training_losses(model, images[batch], t, labels[batch])["loss"].mean()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                trained = [p for p in model.parameters() if p.requires_grad]
                averaged = [p for p in ema.parameters() if p.requires_grad]
                torch._foreach_lerp_(averaged, trained, 1 - EMA_DECAY)
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            progress.update(task, advance=1, loss=smooth)
    return ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ema = train(args.steps, args.seed)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in ema.state_dict().items()}
    save_file(weights, args.out, metadata={"config": json.dumps(dataclasses.asdict(CONFIG))})
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {sum(w.numel() for w in weights.values()):,} values")


if __name__ == "__main__":
    main()
