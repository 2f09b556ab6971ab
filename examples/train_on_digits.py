"""Train a small DiT on 8x8 digits, sample from the weights it exports, and measure the samples: a minute on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import ditfast
from ditfast.training import Digits, TrainSettings


def main(arguments: list[str] | None = None) -> ditfast.evaluation.Report:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of training; default %(default)s")
    parser.add_argument("--count", type=int, default=200, help="of samples; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="a folder for the run; default %(default)s")
    args = parser.parse_args(arguments)

    config = ditfast.DiTConfig(depth=2, hidden_size=64, num_heads=4, input_size=8, in_channels=1, num_classes=10)
    print(f"{ditfast.flops.parameters(config):,} parameters, {ditfast.flops.macs(config):,} multiply-adds an image")
    settings = TrainSettings(steps=args.steps, batch=64, rate=1e-3, ema=(0.95,))
    weights = ditfast.Trainer(ditfast.DiT(config), Digits(), settings, args.out / "run").run()

    labels = [k % 10 for k in range(args.count)]
    samples = ditfast.sample(ditfast.load_checkpoint(weights), labels, num_steps="ddim20", cfg_scale=1.5, clip=True)
    samples.save(args.out / "samples.npz")
    report = ditfast.evaluation.compare_with_digits(ditfast.evaluation.open_images(args.out / "samples.npz"))
    print(report)
    return report


if __name__ == "__main__":
    main()
