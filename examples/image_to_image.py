"""Image to image: digits are noised half-way, and denoised as another class, which keeps part of their shape."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ditfast
from ditfast.diffusion import GaussianDiffusion


def main(arguments: list[str] | None = None) -> tuple[ditfast.sampling.Samples, ditfast.sampling.Samples]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start-time", type=int, default=500, help="999 keeps nothing of an image, 0 all; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("image_to_image"), help="a folder for both grids; default %(default)s")
    args = parser.parse_args(arguments)

    model = ditfast.load_digits()
    sources = ditfast.sample(model, labels=[1] * 8)
    noise = torch.randn(sources.latents.shape, generator=torch.Generator().manual_seed(0))
    times = torch.full((len(sources),), args.start_time)
    noised = GaussianDiffusion().add_noise(sources.latents, times, noise)
    changed = ditfast.sample(model, labels=[7] * 8, latents=noised, start_time=args.start_time)

    args.out.mkdir(parents=True, exist_ok=True)
    sources.save(args.out / "sources.png")
    changed.save(args.out / "changed.png")
    print(f"{args.out}: eight ones, and sevens that begin from them at time {args.start_time}")
    return sources, changed


if __name__ == "__main__":
    main()
