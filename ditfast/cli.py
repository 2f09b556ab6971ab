"""``ditfast doctor | sample | train | extract-latents | evaluate | convert | compile | tune | bench``"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from . import interrupt
from .commands import compile, convert, doctor, evaluate, extract_latents, sample, train, tune
from .devices import DeviceError
from .free_memory import is_out_of_memory, shortage
from .terminal import HelpFormatter

EXAMPLES = """examples:
  ditfast doctor                                  versions, device, and which engine each op takes, and why
  ditfast sample                                  a labelled grid from the digits model that ships with ditfast
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

BEGINNING = """Diffusion Transformers (DiT) on fused Triton kernels. To begin with:

Draw digits with the model that ships with ditfast, in seconds:
  ditfast sample
Train that model again (pip install scikit-learn):
  ditfast train --data digits --steps 5000 --out run
Speed up a model that you have, of diffusers, SiT or the official code:
  python -c "import ditfast, diffusers; \\
      model = diffusers.DiTTransformer2DModel(num_layers=2).eval(); \\
      ditfast.accelerate(model); print(ditfast.acceleration_report(model))"
Compare with eager and compiled PyTorch here (pip install 'ditfast[bench]'):
  ditfast bench --models DiT-S/2
See what is installed, and which engine each op takes on this machine:
  ditfast doctor

`ditfast --help` lists all commands; `ditfast COMMAND --help` has examples.
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
    return interrupt.run(interrupt.command_name(arguments), lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    if not arguments:
        command = "ditfast" if shutil.which("ditfast") else "python -m ditfast"
        print(BEGINNING.replace("\n  ditfast", f"\n  {command}"), end="")
        return 0
    if arguments[:1] == ["bench"]:  # has its own arguments and --help
        from ditfast.benchmarks import bench

        return bench.main(arguments[1:])
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:  # argparse would name ditfast without the command
        args.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return args.run(args)
    except DeviceError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"{args.prog}: {shortage(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ditfast",
        description="Diffusion Transformers on fused Triton kernels.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=HelpFormatter,
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run, prog=added.prog, error=added.error)
    commands.add_parser("bench", help="time DiT forwards against their rivals (its own --help)", add_help=False)
    return parser
