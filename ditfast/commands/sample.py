"""``ditfast sample``: from a checkpoint to a grid, or to a folder of images."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import vae as autoencoder
from ..checkpoints import WEIGHTS, CheckpointError, load_checkpoint
from ..checkpoints.source import training_of
from ..checkpoints.trained_for import TrainedFor
from ..class_names import ClassNameError, find_class, read_names
from ..config import DiTConfig
from ..devices import add_device_argument
from ..diffusion import SOLVERS, Step
from ..digits import load_digits
from ..dtypes import DTYPES, INT8
from ..files import free_path
from ..free_memory import MemoryShortage
from ..model import DiT
from ..ops.cpu_chain import check_int8
from ..sampling import Sampler
from ..sampling.folder import FolderError, RunStopped
from ..sampling.painter import Painter, label_of
from ..sampling.ranks import Ranks, RanksError
from ..sampling.recipe import (
    check_solver,
    default_cfg_scale,
    default_dtype,
    default_num_steps,
    default_solver,
    default_vae,
    fitted_vae,
    insisted,
    is_digits,
    is_pixels,
    solver_steps,
)
from ..sampling.settings import device_kind, digest, versions
from ..terminal import say
from .arguments import (
    BadArgument,
    batch_size,
    ended,
    finite,
    positive,
    ranks_from_environment,
    say_which,
    seed,
    warnings_on_one_line,
)
from .memory import sampling_memory
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
NO_VAE = "none"
MOST_IMAGES = 10**7
GRID_SUFFIX = ".png"
GRID = f"digits{GRID_SUFFIX}"
OTHER_FILES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npz"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=_out, metavar="DIR|FILE.png", help=f"a folder, or one grid; default: {GRID}, or a free name"
    )
    what = parser.add_argument_group("what")
    what.add_argument("--checkpoint", metavar="PATH", help="a file, a diffusers or a run's folder; default: the digits model")
    what.add_argument("--weights", choices=WEIGHTS, default="auto", help="of the checkpoint; default: the EMA if there is one")
    what.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers, or class names; default: all")
    what.add_argument("--labels", type=Path, metavar="FILE", help="names of all classes: one a line, or JSON")
    count = what.add_mutually_exclusive_group()
    count.add_argument("--per-class", type=positive, metavar="N", help="images a class; default: 10 digits, 1 of a checkpoint")
    count.add_argument(
        "--num", "--num-images", type=positive, metavar="N", help="images in all, each of a class drawn from --classes"
    )
    what.add_argument("--seed", type=seed, default=0, help="with an image's number it decides the image; default 0")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--solver",
        choices=SOLVERS,
        help="ddpm, ddim: of a DiT; euler, heun, sde: of flow matching (SiT); default: what the checkpoint was trained for",
    )
    how.add_argument("--force-solver", action="store_true", help="take --solver whatever the checkpoint was trained for")
    how.add_argument("--steps", help="250, or ddim50, 10,15,20 (respacing); default: 250, digits ddim50 or 50")
    how.add_argument("--cfg", type=finite, help="guidance scale; 1 is none; default: 4, digits 2, without a null class 1")
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
        help="of the model; int8: its products on a CPU; default: bf16 on a GPU, fp32 on a CPU",
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
    except MemoryShortage as error:
        return ended("sample", ranks, str(error), 1)
    return 0


def _sample(args: argparse.Namespace, ranks: Ranks) -> None:
    _check_together(args, ranks)
    if args.dtype == INT8:
        _check_int8(args.device)
    model = load_digits() if args.checkpoint is None else load_checkpoint(args.checkpoint, weights=args.weights)
    if args.checkpoint is not None:
        say_which(args.checkpoint, model, ranks)
    config, trained_for = model.config, training_of(model.source, model.config)
    _fill_in(args, config, trained_for)
    if args.force_solver:
        config, trained_for = insisted(args.solver, config, trained_for)
    classes = _classes(args, config, trained_for.class_names)
    try:
        check_solver(args.solver, trained_for, "--solver", "; --force-solver insists", "; --force-solver insists")
        schedule = solver_steps(args.solver, args.steps, config, trained_for, "--steps")
    except ValueError as error:
        raise BadArgument(str(error)) from error
    vae = _vae(args.vae, config, trained_for)
    num = args.num or len(classes) * args.per_class
    if num > MOST_IMAGES:
        name = "--num" if args.num else "--per-class"
        raise BadArgument(f"{name}: got {num} images in all, expected at most {MOST_IMAGES}: other seeds make more")
    with sampling_memory(args, model.config, vae, num):
        _draw(args, ranks, model, config, vae, schedule, classes, num)


def _draw(
    args: argparse.Namespace,
    ranks: Ranks,
    model: DiT,
    config: DiTConfig,
    vae: autoencoder.VAE | None,
    schedule: Sequence[Step],
    classes: Sequence[int],
    num: int,
) -> None:
    label = partial(label_of, classes=classes, per_class=args.per_class, seed=args.seed)
    options: dict[str, Any] = {"cfg_interval": tuple(args.cfg_interval)} if args.cfg_interval else {}
    model = _in_int8(model.float(), ranks) if args.dtype == INT8 else model.to(args.device, DTYPES[args.dtype])
    sampler = Sampler(model, schedule, seed=args.seed, clip=vae is None, config=config, **options)
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
        how = f"{args.solver}, {len(schedule)} steps, guidance {args.cfg:g}, seed {args.seed}, {args.dtype}"
        say(f"{args.out}: {num} images, {how}")


def _check_int8(device: torch.device) -> None:
    try:
        check_int8("--dtype", [torch.empty(0, device=device)])
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
        "model": model.config.as_dict(),
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
    if args.out is None or args.out.suffix.lower() == GRID_SUFFIX:
        for name, given in (("--num", args.num), ("--npz", args.npz), ("torchrun", ranks.world > 1)):
            if given:
                raise BadArgument(f"--out: got {args.out or 'none'}, but {name} needs a folder")
    if args.out is None:
        args.out = _default_out(args)
    if args.checkpoint is not None and args.classes is None and args.num is None:
        raise BadArgument("--classes or --num: got neither, expected one with --checkpoint")
    if args.cfg_interval and args.cfg_interval[0] > args.cfg_interval[1]:
        raise BadArgument(f"--cfg-interval: got {args.cfg_interval[0]:g} {args.cfg_interval[1]:g}, expected LO <= HI")


def _default_out(args: argparse.Namespace) -> Path:
    """Return a name for a grid that no file has."""
    name = GRID if args.checkpoint is None else f"samples{GRID_SUFFIX}"
    try:
        return _out(str(free_path(Path(name))))
    except argparse.ArgumentTypeError as error:
        raise BadArgument(f"--out: {error}") from error


def _fill_in(args: argparse.Namespace, config: DiTConfig, trained_for: TrainedFor) -> None:
    """Fill in the defaults, of which the digits model has its own."""
    digits = is_digits(config)
    if args.solver is None:
        args.solver = default_solver(trained_for, digits, args.steps)
    if args.steps is None:
        args.steps = default_num_steps(digits, args.solver)
    if args.cfg is None:
        args.cfg = default_cfg_scale(digits, config)
    if args.dtype is None:
        args.dtype = default_dtype(args.device)
    if args.batch is None:
        args.batch = 100 if digits else 16
    if args.per_class is None and args.num is None:
        args.per_class = 10 if args.checkpoint is None else 1
    if args.vae is None:
        args.vae = default_vae(config, args.checkpoint, trained_for) or NO_VAE
    if args.cfg != 1 and not config.has_null_class:
        raise BadArgument(f"--cfg: got {args.cfg:g}, expected 1, as this model has no null class to guide away from")


def _classes(args: argparse.Namespace, config: DiTConfig, names: Sequence[str] | None) -> list[int]:
    """Each once, in the order given. Names that are the numbers, as the digits', name nothing."""
    if names == tuple(map(str, range(config.num_classes))):
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


def _vae(source: str, config: DiTConfig, trained_for: TrainedFor) -> autoencoder.VAE | None:
    if source == NO_VAE:
        if not is_pixels(config, trained_for):
            raise BadArgument(f"--vae: got none, but the model makes {config.in_channels} channels, which are no pixels")
        return None
    return fitted_vae(autoencoder.load_vae(source), config, trained_for)


def _out(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() in OTHER_FILES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder or a name that ends in .png")
    if path.suffix.lower() == GRID_SUFFIX:
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"got {text!r}, but the folder {path.parent} does not exist")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"got {text!r}, which is a folder")
        if path.exists():
            raise argparse.ArgumentTypeError(f"got {text!r}, which exists already: give another name, or remove it")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"got {text!r}, but no file can be written there: {error.strerror}") from error
    return path
