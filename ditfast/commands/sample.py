"""``ditfast sample``: from a checkpoint to a grid, or to a folder of images."""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import cpu
from .. import vae as autoencoder
from ..argument_checks import describe
from ..checkpoints import WEIGHTS, CheckpointError, load_checkpoint
from ..class_names import ClassNameError, find_class, read_names
from ..config import DiTConfig
from ..devices import add_device_argument
from ..diffusion import SOLVERS, FlowMatching, GaussianDiffusion, Step, steps
from ..diffusion.flow import MOST_STEPS
from ..digits import load_digits
from ..dtypes import DTYPES, INT8
from ..model import DiT
from ..sampling import Sampler
from ..sampling.folder import FolderError, RunStopped
from ..sampling.painter import Painter, label_of
from ..sampling.ranks import Ranks, RanksError
from ..sampling.settings import device_kind, digest, versions
from .arguments import BadArgument, batch_size, ended, finite, positive, ranks_from_environment, seed, warnings_on_one_line
from .sample_out import draw_grid, fill_folder

HELP = "images from a checkpoint, or from the digits model that ships with ditfast"
DESCRIPTION = """Draws images. FILE.png gets one labelled grid. A folder gets 000000.png, 000001.png and so on, and run.json;
the same command, killed and started again, makes the images that are missing, the same bytes. So does torchrun with
any number of processes."""
EXAMPLES = """examples:
  ditfast sample --out digits.png --classes 3 1 4 --cfg 3
  ditfast sample --checkpoint DiT-XL-2-256x256.pt --classes 207 360 --per-class 4 --out animals
  ditfast sample --checkpoint dit-xl --labels imagenet.txt --classes otter "golden retriever" --steps ddim50 --out pets
  ditfast sample --checkpoint SiT-XL-2-256.pt --solver heun --steps 125 --cfg-interval 0.1 0.7 --classes 88 --out macaws
  torchrun --nproc-per-node 8 -m ditfast sample --checkpoint DiT-XL-2-256x256.pt --num-images 50000 --cfg 1.5 --npz --out fid
"""
FLOW_SOLVERS = ("euler", "heun", "sde")
PIXEL_CHANNELS = (1, 3)
NO_VAE = "none"
MOST_IMAGES = 10**7
GRID_SUFFIX = ".png"
OTHER_FILES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npz"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=_out, required=True, metavar="DIR|FILE.png", help="a folder, or one grid")
    what = parser.add_argument_group("what")
    what.add_argument("--checkpoint", metavar="PATH", help="a file, or a diffusers folder; default: the digits model")
    what.add_argument("--weights", choices=WEIGHTS, default="auto", help="of the checkpoint; default: the EMA if there is one")
    what.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers, or names of --labels; default: all")
    what.add_argument("--labels", type=Path, metavar="FILE", help="names of all classes: one a line, or JSON")
    count = what.add_mutually_exclusive_group()
    count.add_argument("--per-class", type=positive, metavar="N", help="images a class; default: 10 digits, 1 of a checkpoint")
    count.add_argument(
        "--num", "--num-images", type=positive, metavar="N", help="images in all, each of a class drawn from --classes"
    )
    what.add_argument("--seed", type=seed, default=0, help="with an image's number it decides the image; default 0")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--solver", choices=SOLVERS, help="ddpm, ddim: of a DiT; euler, heun, sde: of a SiT; default: ddim or ddpm"
    )
    how.add_argument("--steps", help="250, or ddim50, 10,15,20 (respacing); default: 250, digits ddim50")
    how.add_argument("--cfg", type=finite, help="guidance scale; 1 is none; default: 4, digits 2")
    how.add_argument(
        "--cfg-interval", type=finite, nargs=2, metavar=("LO", "HI"), help="guide between these times only (0..999; SiT: 0..1)"
    )
    how.add_argument(
        "--vae", metavar="NAME|DIR|none", help=f"decodes latents; default: the checkpoint's, or {autoencoder.OFFICIAL}"
    )
    how.add_argument("--batch", type=batch_size, metavar="N", help="images computed together; default: 16, digits 100")
    how.add_argument(
        "--dtype",
        choices=[*DTYPES, INT8],
        default="fp32",
        help="of the model; int8: its products on a CPU; default %(default)s",
    )
    add_device_argument(parser, how)
    how.add_argument("--npz", action="store_true", help="also samples.npz, as ADM's evaluation reads it")


def run(args: argparse.Namespace) -> int:
    ranks = Ranks()
    try:
        ranks = ranks_from_environment()
        with warnings_on_one_line("sample", ranks):
            _sample(args, ranks)
    except (BadArgument, CheckpointError, ClassNameError, FolderError, autoencoder.VAEError) as error:
        return ended("sample", ranks, str(error), 2)
    except (RunStopped, RanksError) as error:
        return ended("sample", ranks, str(error), 1)
    except FloatingPointError as error:
        return ended("sample", ranks, f"{error}; --dtype fp32 has the widest range", 1)
    except torch.OutOfMemoryError:
        return ended("sample", ranks, f"--batch: got {args.batch}, for which the device has too little memory", 1)
    except KeyboardInterrupt:
        return ended("sample", ranks, "interrupted", 130)
    return 0


def _sample(args: argparse.Namespace, ranks: Ranks) -> None:
    _check_together(args, ranks)
    if args.dtype == INT8:
        _check_int8(args.device)
    model = load_digits() if args.checkpoint is None else load_checkpoint(args.checkpoint, weights=args.weights)
    _fill_in(args, model.config)
    classes = _classes(args, model.config)
    schedule = _steps(args, model.config)
    vae = _vae(args.vae, model.config)
    num = args.num or len(classes) * args.per_class
    if num > MOST_IMAGES:
        name = "--num" if args.num else "--per-class"
        raise BadArgument(f"{name}: got {num} images in all, expected at most {MOST_IMAGES}: other seeds make more")
    label = partial(label_of, classes=classes, per_class=args.per_class, seed=args.seed)
    options: dict[str, Any] = {"cfg_interval": tuple(args.cfg_interval)} if args.cfg_interval else {}
    model = _in_int8(model.float(), ranks) if args.dtype == INT8 else model.to(args.device, DTYPES[args.dtype])
    sampler = Sampler(model, schedule, seed=args.seed, clip=vae is None, **options)
    painter = Painter(sampler, label, args.cfg, None if vae is None else vae.to(args.device))
    if args.out.suffix.lower() == GRID_SUFFIX:
        draw_grid(args.out, painter, classes, args.per_class, args.batch)
    else:
        fill_folder(
            args.out,
            painter,
            num,
            args.batch,
            ranks,
            settings=_settings(args, painter, classes, num),
            about={"checkpoint": args.checkpoint, "weights": str(model.source), "vae": args.vae},
            grid=None if args.num else (classes, args.per_class),
            npz=args.npz,
        )
    if ranks.rank == 0:
        print(f"{args.out}: {num} images, {args.solver}, {len(schedule)} steps, guidance {args.cfg:g}, seed {args.seed}")


def _check_int8(device: torch.device) -> None:
    try:
        cpu.check("--dtype", [torch.empty(0, device=device)])
    except ValueError as error:
        raise BadArgument(str(error)) from error


def _in_int8(model: DiT, ranks: Ranks) -> DiT:
    """One rank measures and prints, for all."""
    if ranks.rank == 0:
        return model.quantize()
    model.int8 = True
    return model


def _settings(args: argparse.Namespace, painter: Painter, classes: Sequence[int], num: int) -> dict[str, Any]:
    """What decides the bytes of the images."""
    vae, model = painter.vae, painter.sampler.model
    return {
        "weights": digest(model.state_dict()),
        "model": dataclasses.asdict(model.config),
        "vae": None if vae is None else {"weights": digest(vae.state_dict()), **autoencoder.scaling(vae)},
        "classes": list(classes) if args.classes else "all",
        "per_class": args.per_class,
        "num": num,
        "batch": args.batch,
        "seed": args.seed,
        "solver": args.solver,
        "steps": args.steps,
        "cfg": args.cfg,
        "cfg_interval": args.cfg_interval,
        "clip": vae is None,
        "dtype": args.dtype,
        "device": device_kind(args.device),
        **versions(),
    }


def _check_together(args: argparse.Namespace, ranks: Ranks) -> None:
    if args.out.suffix.lower() == GRID_SUFFIX:
        for name, given in (("--num", args.num), ("--npz", args.npz), ("torchrun", ranks.world > 1)):
            if given:
                raise BadArgument(f"--out: got {args.out}, but {name} needs a folder")
    if args.checkpoint is not None and args.classes is None and args.num is None:
        raise BadArgument("--classes or --num: got neither, expected one with --checkpoint")
    if args.cfg_interval and args.cfg_interval[0] > args.cfg_interval[1]:
        raise BadArgument(f"--cfg-interval: got {args.cfg_interval[0]:g} {args.cfg_interval[1]:g}, expected LO <= HI")


def _fill_in(args: argparse.Namespace, config: DiTConfig) -> None:
    """The defaults, which are not the same for the digits as for a checkpoint."""
    digits = args.checkpoint is None
    if args.solver is None:
        args.solver = "ddim" if digits or (args.steps or "").startswith("ddim") else "ddpm"
    if args.steps is None:
        args.steps = "ddim50" if digits and args.solver not in FLOW_SOLVERS else "250"
    if args.cfg is None:
        args.cfg = 2.0 if digits else 4.0
    if args.batch is None:
        args.batch = 100 if digits else 16
    if args.per_class is None and args.num is None:
        args.per_class = 10 if digits else 1
    if args.vae is None:
        bundled = args.checkpoint is not None and (Path(args.checkpoint) / "vae").is_dir()
        latents = config.in_channels not in PIXEL_CHANNELS
        args.vae = (args.checkpoint if bundled else autoencoder.OFFICIAL) if latents else NO_VAE
    if args.cfg != 1 and config.label_rows == config.num_classes:
        raise BadArgument(f"--cfg: got {args.cfg:g}, expected 1, as this model has no null class to guide away from")


def _classes(args: argparse.Namespace, config: DiTConfig) -> list[int]:
    """Each once, in the order given."""
    names = None
    if args.labels is not None:
        names = read_names(args.labels)
        if len(names) != config.num_classes:
            raise BadArgument(f"--labels: got {len(names)} names, expected {config.num_classes}, one for each class")
    if args.classes is None:
        return list(range(config.num_classes))
    try:
        return list(dict.fromkeys(find_class(text, config.num_classes, names) for text in args.classes))
    except ClassNameError as error:
        raise BadArgument(f"--classes: {error}") from error


def _steps(args: argparse.Namespace, config: DiTConfig) -> list[Step]:
    if args.solver in FLOW_SOLVERS:
        if not re.fullmatch("[0-9]{1,9}", args.steps) or not 1 <= int(args.steps) <= MOST_STEPS:
            got = f"--steps: got {describe(args.steps)}"
            raise BadArgument(f"{got}, expected a positive integer with {args.solver}, up to {MOST_STEPS}")
        return steps(FlowMatching(num_steps=int(args.steps)), args.solver)
    try:
        return steps(GaussianDiffusion(args.steps, learn_sigma=config.learn_sigma), args.solver)
    except ValueError as error:
        raise BadArgument(f"--steps: {error}") from error


def _vae(source: str, config: DiTConfig) -> autoencoder.VAE | None:
    if source == NO_VAE:
        if config.in_channels not in PIXEL_CHANNELS:
            raise BadArgument(f"--vae: got none, but the model makes {config.in_channels} channels, which are no pixels")
        return None
    vae = autoencoder.load_vae(source)
    autoencoder.check_channels(vae, config.in_channels)
    return vae


def _out(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() in OTHER_FILES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder or a name that ends in .png")
    if path.suffix.lower() == GRID_SUFFIX:
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"got {text!r}, but the folder {path.parent} does not exist")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"got {text!r}, which is a folder")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"got {text!r}, but no file can be written there: {error.strerror}") from error
    return path
