"""From labels to images: the digits model that ships with ditfast, and a callback that reports the noise that is left."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

import ditfast


def report(step: int, time: float, latents: Tensor) -> None:
    if step % 10 == 0:
        print(f"step {step:2}, time {time:3.0f}: standard deviation {latents.std():.2f}")


def main(arguments: list[str] | None = None) -> ditfast.sampling.Samples:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="a grid; default %(default)s")
    args = parser.parse_args(arguments)
    samples = ditfast.sample(ditfast.load_digits(), labels=list(range(10)), cfg_scale=3.0, seed=1, callback=report)
    samples.save(args.out)
    print(samples)
    return samples


if __name__ == "__main__":
    main()
