"""``ditfast extract-latents``"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .. import vae as autoencoder
from ..devices import add_device_argument
from ..free_memory import MemoryShortage
from ..interrupt import keeping
from ..sampling.folder import FolderError, RunStopped
from ..sampling.ranks import Ranks, RanksError
from ..terminal import say
from ..training.data import DataError, ImageFolder, Latents
from ..training.extract import Extraction
from .arguments import BadArgument, batch_size, ended, image_size, positive, ranks_from_environment, warnings_on_one_line
from .memory import encoding_memory
from .progress import image_progress

NAME = "extract-latents"
HELP = "a VAE's latents of a folder of images, to train on"
DESCRIPTION = """Encodes images, and their mirror images, with a VAE. DIR gets shards of means and standard deviations, of which
ditfast train draws latents. Killed and started again it writes what is missing, the same bytes."""
EXAMPLES = """examples:
  ditfast extract-latents imagenet/train latents --image-size 256
  torchrun --nproc-per-node 8 -m ditfast extract-latents imagenet/train latents --image-size 256 --vae sd-vae-ft-ema
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images, or of folders of them, one a class")
    parser.add_argument("out", type=Path, metavar="DIR", help="the folder of latents")
    parser.add_argument("--vae", default=autoencoder.OFFICIAL, metavar="NAME|DIR", help="default: %(default)s")
    parser.add_argument("--image-size", type=image_size, default=256, metavar="N", help="pixels; default %(default)s")
    parser.add_argument("--batch", type=batch_size, default=32, metavar="N", help="images encoded at once; default %(default)s")
    parser.add_argument("--shard", type=positive, default=1024, metavar="N", help="images in a file; default %(default)s")
    parser.add_argument("--readers", type=positive, metavar="N", help="threads that read images; default: one a core, up to 16")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    ranks = Ranks()
    try:
        ranks = ranks_from_environment()
        with warnings_on_one_line(NAME, ranks):
            _extract(args, ranks)
    except (BadArgument, DataError, FolderError, autoencoder.VAEError) as error:
        return ended(NAME, ranks, str(error), 2)
    except (FloatingPointError, MemoryShortage, RanksError, RunStopped) as error:
        return ended(NAME, ranks, str(error), 1)
    return 0


def _extract(args: argparse.Namespace, ranks: Ranks) -> None:
    images = ImageFolder(args.images, args.image_size)
    vae = autoencoder.load_vae(args.vae).to(args.device)
    readers = args.readers or min(16, os.cpu_count() or 1)
    extraction = Extraction(images, vae, args.out, args.batch, args.shard, readers)
    extraction.claim({"images": str(args.images), "vae": args.vae, "class_names": images.class_names})
    missing = len(extraction.folder.missing())
    if ranks.rank == 0 and 0 < missing < len(extraction.blocks):
        say(f"{args.out}: {len(extraction.blocks) - missing} of {len(extraction.blocks)} shards are there already")
    with keeping(lambda: _kept(extraction)), encoding_memory(args, vae), ranks.joined() as barrier:
        shards = extraction.unfinished(ranks)
        with image_progress("encoding", sum(len(extraction.blocks[shard]) for shard in shards), ranks) as advance:
            extraction.write(shards, advance)
        barrier()
    if ranks.rank == 0:
        extraction.folder.tidy()
        latents = Latents(args.out)
        say(f"{args.out}: {len(latents)} images of {latents.num_classes} classes, {latents.unreadable} unreadable")


def _kept(extraction: Extraction) -> str:
    shards, missing = len(extraction.blocks), len(extraction.folder.missing())
    return f"{extraction.folder.path}: {shards - missing} of {shards} shards are there; the same command writes the rest"
