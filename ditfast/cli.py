"""``ditfast doctor | sample | train | extract-latents | evaluate | convert | compile | tune | bench``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .commands import compile, convert, doctor, evaluate, extract_latents, sample, train, tune
from .devices import DeviceError

EXAMPLES = """examples:
  ditfast doctor                                  versions, device, and which engine each op takes, and why
  ditfast sample --out digits.png                 a labelled grid from the digits model that ships with ditfast
  ditfast sample --out sevens.png --classes 7 --per-class 20 --cfg 3 --seed 1
  ditfast sample --checkpoint DiT-XL-2-256x256.pt --classes 207 360 --out animals
  ditfast train --data digits --steps 5000 --out run   the digits model again; --resume auto goes on with a killed run
  ditfast extract-latents imagenet/train latents  a VAE's latents of a folder of images, for ditfast train --data latents
  ditfast evaluate images --reference digits      Frechet distance, precision and recall of a folder of samples
  ditfast convert dit.pt dit --to diffusers       official weights as a folder for diffusers, or the other way
  ditfast compile --arch sm_90 --model DiT-XL/2   its kernels into Triton's cache, without a GPU: for containers
  ditfast tune                                    measure every op on this GPU; the fastest are taken from then on
  ditfast bench --models DiT-S/2 --batch 1 8      takes the arguments of benchmarks/bench.py

`ditfast COMMAND --help` has more. `torchrun --nproc-per-node 8 -m ditfast sample ...` samples on eight devices.
"""

COMMANDS = {
    "doctor": doctor,
    "sample": sample,
    "train": train,
    extract_latents.NAME: extract_latents,
    "evaluate": evaluate,
    "convert": convert,
    "compile": compile,
    "tune": tune,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # has its own arguments and --help
        from ditfast.benchmarks import bench

        return bench.main(arguments[1:])
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except DeviceError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"{args.prog}: the device has too little memory: see what else uses it (nvidia-smi lists it)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ditfast",
        description="Diffusion Transformers on fused Triton kernels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run, prog=added.prog)
    commands.add_parser("bench", help="time DiT forwards against their rivals (its own --help)", add_help=False)
    return parser
