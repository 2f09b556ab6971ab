"""``ditfast train``: a DiT by the paper's recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import interrupt
from .. import vae as autoencoder
from ..checkpoints import CheckpointError, load_checkpoint
from ..checkpoints.runs import CHECKPOINTS, find_steps
from ..config import CONDITIONINGS, MODEL_NAMES, PREDICTIONS, DiTConfig
from ..devices import add_device_argument
from ..diffusion.flow import PATHS
from ..digits import DIGITS_CONFIG
from ..free_memory import MemoryShortage
from ..model import DiT
from ..sampling.ranks import Ranks, RanksError
from ..terminal import say
from ..training import CheckpointFault, DataError, RunError, RunOptions, Trainer, TrainingStopped, TrainSettings, open_data
from ..training.data import Data
from ..training.determinism import fix_workspace
from ..training.errors import Caller, TrainingInterrupted
from ..training.parallel import KINDS, joined
from ..training.settings import DTYPES, LOSSES, SCHEDULES, TIMESTEPS
from .arguments import (
    BadArgument,
    batch_size,
    ended,
    finite,
    image_size,
    natural,
    positive,
    ranks_from_environment,
    say_which,
    seed,
    warnings_on_one_line,
)
from .memory import training_memory
from .train_progress import training_progress

HELP = "a model by the paper's recipe, on one device or many; killed and resumed"
DESCRIPTION = """Trains a DiT. DIR gets checkpoints, log.jsonl (a line a step), samples, TensorBoard's scalars and at the end
model.safetensors, the average of the weights as official code reads it. The same command with --resume auto goes on with a run
that was killed, on any number of processes."""
EXAMPLES = """examples:
  ditfast train --data digits --steps 5000 --out run
  ditfast train --data digits --steps 5000 --out run --resume auto
  ditfast train --model DiT-S/2 --data photographs --vae stabilityai/sd-vae-ft-ema --image-size 256 --steps 400000 --out run
  ditfast extract-latents imagenet/train latents --vae stabilityai/sd-vae-ft-ema --image-size 256
  torchrun --nproc-per-node 8 -m ditfast train --model DiT-L/2 --data latents --dtype bf16 --steps 400000 --out l --resume auto
"""
CALLER = Caller("ditfast train", "--resume auto")
DIGITS = "digits"
DEFAULT_LOSS = "hybrid"
DIGITS_RECIPE = {"batch": 128, "rate": 1e-3, "schedule": "cosine", "warm_up": 200, "ema": [0.999], "flip": False}
PAPERS_RECIPE = {"batch": 256, "rate": 1e-4, "schedule": "constant", "warm_up": 0, "ema": [0.9999], "flip": True}
NOT_LATENTS = (1, 3)  # channels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="PATH|digits", help="a folder of images or of latents; digits: 8x8 scans"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--resume", choices=("auto", "no"), default="no", help="auto: go on with the run in DIR if there is one"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", choices=MODEL_NAMES, metavar="NAME", help="as DiT-XL/2; default: DiT-S/2, of digits the one that ships"
    )
    model.add_argument(
        "--conditioning", choices=CONDITIONINGS, metavar="KIND", default="adaln_zero", help="default %(default)s"
    )
    model.add_argument("--init", metavar="PATH", help="begin with a checkpoint's or run's weights, not random ones")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--image-size", type=image_size, default=256, metavar="N", help="of a folder of images; default %(default)s"
    )
    data.add_argument(
        "--vae", metavar="NAME|DIR", help="encodes images, and decodes samples; images without one are trained as pixels"
    )
    data.add_argument("--no-flip", dest="flip", action="store_false", default=None, help="do not mirror every other image")
    data.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="processes that read, beside each rank; default %(default)s"
    )
    data.add_argument("--max-bad-records", type=natural, default=100, metavar="N", help="unreadable ones; default %(default)s")
    recipe = parser.add_argument_group("recipe", "the defaults are the paper's, of digits those of the model that ships")
    recipe.add_argument("--steps", type=positive, required=True, metavar="N")
    recipe.add_argument(
        "--batch", type=batch_size, metavar="N", help="images in a step, over all ranks; default: 256, digits 128"
    )
    recipe.add_argument(
        "--accumulate", type=positive, default=1, metavar="N", help="parts a rank cuts its share of a batch into"
    )
    recipe.add_argument("--loss", choices=LOSSES, help="flow: SiT's; default: hybrid, or that of --init's checkpoint")
    recipe.add_argument(
        "--prediction", choices=PREDICTIONS, help="what the model learns to predict; default: epsilon, or what --init's does"
    )
    recipe.add_argument("--path", choices=PATHS, help="of flow matching; default: linear, or that of --init's checkpoint")
    recipe.add_argument("--timesteps", choices=TIMESTEPS, default="uniform", help="how they are drawn; default %(default)s")
    recipe.add_argument("--rate", type=finite, help="learning rate; default: 1e-4, digits 1e-3")
    recipe.add_argument("--schedule", choices=SCHEDULES, help="of the rate; default: constant, digits cosine")
    recipe.add_argument("--warm-up", type=natural, metavar="N", help="steps in which the rate rises; default: 0, digits 200")
    recipe.add_argument("--weight-decay", type=finite, default=0.0, help="default %(default)s")
    recipe.add_argument("--max-norm", type=finite, help="clip gradients to this norm; default: no clipping")
    recipe.add_argument(
        "--ema", type=finite, nargs="+", metavar="DECAY", help="the first is exported; default: 0.9999, digits 0.999"
    )
    recipe.add_argument("--seed", type=seed, default=0, help="default %(default)s")
    recipe.add_argument(
        "--max-skipped", type=natural, default=25, metavar="N", help="steps in a row that may be infinite or NaN"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="bf16, fp16: autocast over fp32 weights; default %(default)s"
    )
    how.add_argument("--checkpoint-activations", action="store_true", help="less memory: keep the outputs of products only")
    how.add_argument("--compile", action="store_true", help="the model with torch.compile")
    how.add_argument(
        "--deterministic", action="store_true", help="on a GPU, the same bits in every run, slower; on a CPU they always are"
    )
    how.add_argument("--parallel", choices=KINDS, default=KINDS[0], help="of several ranks; default %(default)s")
    add_device_argument(parser, how)
    how.add_argument("--save-every", type=positive, default=5000, metavar="N", help="steps; default %(default)s")
    how.add_argument("--keep", type=positive, default=2, metavar="N", help="checkpoints; default %(default)s")
    how.add_argument("--sample-every", type=natural, default=0, metavar="N", help="steps between grids of samples; 0: none")
    how.add_argument("--evaluate-every", type=natural, default=0, metavar="N", help="steps between evaluations; 0: none")


def run(args: argparse.Namespace) -> int:
    ranks = Ranks()
    try:
        ranks = ranks_from_environment()
        with warnings_on_one_line("train", ranks), interrupt.keeping(lambda: _kept(args.out)):
            return _train(args, ranks)
    except (BadArgument, CheckpointError, DataError, RunError, autoencoder.VAEError) as error:
        return ended("train", ranks, str(error), 2)
    except TrainingInterrupted as error:
        return ended("train", ranks, str(error), interrupt.STATUS) if ranks.rank == 0 else interrupt.STATUS
    except (TrainingStopped, CheckpointFault, MemoryShortage, RanksError) as error:
        return ended("train", ranks, str(error), 1)


def _train(args: argparse.Namespace, ranks: Ranks) -> int:
    for name, value in (DIGITS_RECIPE if args.data == DIGITS else PAPERS_RECIPE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    initial = _initial(args, ranks)
    _follow(args, initial, ranks)
    settings, options = _settings(args)
    if settings.deterministic:
        fix_workspace()
    vae = None if args.vae is None else autoencoder.load_vae(args.vae).to(args.device)
    data = open_data(args.data, image_size=args.image_size, vae=vae)
    decode = _decoder(args, data, vae)
    config = _config(args, data) if initial is None else initial.config
    pixels = vae is None and args.data != DIGITS and data.input_shape[0] in NOT_LATENTS
    with (
        training_memory(args, settings, config, ranks, pixels=pixels),
        joined(ranks, args.device),
        training_progress(settings.steps, ranks.rank) as on_step,
    ):
        model = (_new(config, args.seed) if initial is None else initial).to(args.device)
        trainer = Trainer(
            model,
            data,
            settings,
            args.out,
            options,
            ranks=ranks,
            parallel=args.parallel,
            decode=decode,
            on_step=on_step,
        )
        trainer.caller = CALLER
        weights = trainer.run(resume=args.resume == "auto")
    if ranks.rank == 0:
        say(f"{weights}: {settings.steps} steps of {settings.batch}, average {settings.ema[0]:g}, {trainer.skipped} skipped")
    return 0


def _kept(out: Path) -> str:
    checkpoints = find_steps(out / CHECKPOINTS)
    return f"{CALLER.resume} goes on from {checkpoints[-1][1]}" if checkpoints else "no checkpoint was written"


def _settings(args: argparse.Namespace) -> tuple[TrainSettings, RunOptions]:
    names = (
        "steps batch accumulate seed loss prediction path timesteps rate schedule warm_up weight_decay max_norm dtype ema flip"
        " checkpoint_activations compile deterministic max_skipped"
    )
    try:
        settings = TrainSettings(**{name: getattr(args, name) for name in names.split()})
    except ValueError as error:
        raise BadArgument(f"--{str(error).replace('_', '-', 1)}") from error
    options = ("save_every", "keep", "sample_every", "evaluate_every", "workers", "max_bad_records")
    return settings, RunOptions(**{name: getattr(args, name) for name in options})


def _initial(args: argparse.Namespace, ranks: Ranks) -> DiT | None:
    """Return the model that the run begins with; None for a new one."""
    if args.init is None:
        return None
    if args.model is not None:
        raise BadArgument(f"--model: got {args.model}, but --init brings its own")
    model = load_checkpoint(args.init)
    say_which(args.init, model, ranks)
    return model.float()


def _follow(args: argparse.Namespace, initial: DiT | None, ranks: Ranks) -> None:
    """Fill in loss and path where nobody names them: those of the initial weights, else the paper's."""
    before = None if initial is None or initial.source is None else initial.source.trained_for
    if args.loss is None and before is not None and args.prediction is None:
        if before.is_flow:
            args.loss = "flow"
        elif before.loss in LOSSES:
            args.loss = before.loss
        if args.loss not in (None, DEFAULT_LOSS) and ranks.rank == 0:
            say(f"{args.init}: was trained with loss {args.loss}, and so it is now; --loss names another")
    if args.loss is None:
        args.loss = DEFAULT_LOSS
    if args.path is None:
        follows = before is not None and before.is_flow and args.loss == "flow" and before.schedule in PATHS
        args.path = before.schedule if before is not None and follows else "linear"


def _config(args: argparse.Namespace, data: Data) -> DiTConfig:
    channels, height, width = data.input_shape
    if args.model is None and args.data == DIGITS:
        return DIGITS_CONFIG
    name = args.model or "DiT-S/2"
    try:
        return DiTConfig.from_name(
            name,
            input_size=(height, width),
            in_channels=channels,
            num_classes=data.num_classes,
            conditioning=args.conditioning,
        )
    except ValueError as error:
        raise BadArgument(f"--model: got {name}, which does not fit the data: {error}") from error


def _new(config: DiTConfig, seed: int) -> DiT:
    torch.manual_seed(seed % 2**63)
    return DiT(config)


def _decoder(args: argparse.Namespace, data: Data, vae: autoencoder.VAE | None) -> Callable[[Tensor], Tensor] | None:
    """Of latents; None where the model makes pixels."""
    channels = data.input_shape[0]
    if vae is None:
        if args.sample_every and channels not in NOT_LATENTS:
            raise BadArgument(f"--sample-every: got {args.sample_every}, but latents need --vae to be seen")
        return None
    autoencoder.check_channels(vae, channels)
    return lambda latents: autoencoder.decode(vae, latents)
