"""``ditfast convert``"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .. import flops
from ..checkpoints import LAYOUTS, WEIGHTS, CheckpointError, differences, load_checkpoint, save_checkpoint
from ..dtypes import DTYPES
from ..interrupt import keeping
from ..sampling.ranks import Ranks
from ..terminal import say
from .arguments import warnings_on_one_line

HELP = "a checkpoint from one layout to the other"
DESCRIPTION = "Writes a DiT checkpoint anew, as official code or as diffusers reads it."
EXAMPLES = """examples:
  ditfast convert DiT-XL-2-256x256.pt dit-xl --to diffusers
  ditfast convert 0400000.pt raw.safetensors --to official --weights model
  ditfast convert dit-xl dit-xl.pt --to official
  ditfast convert run/model.safetensors half.safetensors --to official --dtype bf16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="IN", help="a file (.pt, .bin, .safetensors), a diffusers or a run's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="official: NAME.safetensors or .pt; diffusers: a folder")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="the layout of OUT")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="default: the EMA if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="round the weights; default: as they are stored")


def run(args: argparse.Namespace) -> int:
    try:
        if os.path.lexists(args.out):
            raise CheckpointError(f"{args.out}: exists already, expected a new name")
        with keeping(lambda: f"{args.out} was not written"):
            with warnings_on_one_line("convert", Ranks()):
                model = load_checkpoint(args.checkpoint, weights=args.weights)
            save_checkpoint(model.to(DTYPES[args.dtype]) if args.dtype else model, args.out, layout=args.to)
    except CheckpointError as error:
        print(f"ditfast convert: {error}", file=sys.stderr)
        return 2
    say(str(model.source))
    say(f"{args.out}: {args.to} layout, {flops.parameters(model.config):,} parameters, {model.pos_embed.dtype}")
    differing = differences(model.config, args.to)
    if differing:
        code = "diffusers" if args.to == "diffusers" else "official code"
        say(f"note: {code} computes this model otherwise: {differing}")
    return 0
