"""``ditfast doctor | sample | bench``"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__, ops, reference
from .config import DiTConfig
from .diffusion import GaussianDiffusion
from .digits import load_digits
from .images import labelled_grid, save_png
from .model import DiT
from .ops.attention import choose_engine
from .ops.dispatch import choose_backend, kernels
from .sampling import sample

EXAMPLES = """examples:
  ditfast doctor                                  versions, device, and which engine each op takes, and why
  ditfast sample --out digits.png                 a labelled grid from the digits model that ships with ditfast
  ditfast sample --out sevens.png --classes 7 --per-class 20 --cfg 3 --seed 1
  ditfast bench --models DiT-S/2 --batch 1 8      takes the arguments of benchmarks/bench.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # has its own arguments and --help
        from ditfast.benchmarks import bench

        return bench.main(arguments[1:])
    args = _parser().parse_args(arguments)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ditfast",
        description="Diffusion Transformers on fused Triton kernels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    doctor = commands.add_parser("doctor", help="versions, device, and which engine each op takes, and why")
    doctor.set_defaults(run=_doctor)
    sampler = commands.add_parser(
        "sample",
        help="images from the digits model",
        epilog="example:\n  ditfast sample --out digits.png --classes 3 1 4 --cfg 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sampler.add_argument("--out", type=_png, required=True, metavar="FILE.png")
    sampler.add_argument("--classes", type=_digit, nargs="+", default=list(range(10)), metavar="0..9", help="default: all ten")
    sampler.add_argument("--per-class", type=_positive, default=10, metavar="N", help="images a class; default %(default)s")
    sampler.add_argument("--steps", default="ddim50", help="respacing: ddim50, 250, ...; default %(default)s")
    sampler.add_argument("--cfg", type=_finite, default=2.0, help="guidance scale; 1 is none; default %(default)s")
    sampler.add_argument("--seed", type=_seed, default=0)
    sampler.set_defaults(run=_sample)
    commands.add_parser("bench", help="time DiT forwards against their rivals (its own --help)", add_help=False)
    return parser


def _sample(args: argparse.Namespace) -> int:
    try:
        diffusion = GaussianDiffusion(args.steps)
    except ValueError as error:
        raise SystemExit(f"ditfast sample: --steps: {error}") from error
    model = load_digits().to("cuda" if torch.cuda.is_available() else "cpu")
    classes = list(dict.fromkeys(args.classes))
    labels = torch.tensor(classes).repeat_interleave(args.per_class)
    columns = (TextColumn("denoise"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("denoise", total=len(diffusion.timesteps))
        images = sample(
            model, diffusion, labels, cfg_scale=args.cfg, seed=args.seed, clip=True, on_step=lambda: progress.advance(task)
        )
    save_png(args.out, labelled_grid(dict(zip(classes, images.cpu().split(args.per_class), strict=True))))
    print(f"{args.out}: {len(labels)} digits, {len(diffusion.timesteps)} steps, guidance {args.cfg:g}, seed {args.seed}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    console = Console(width=None if Console().is_terminal else 120)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(_versions_table(device))
    console.print(_engines_table(device))
    healthy, line = _parity(device)
    console.print(line, highlight=False)
    return 0 if healthy else 1


def _versions_table(device: torch.device) -> Table:
    table = Table("", "version", title="Installed", title_justify="left")
    table.add_row("ditfast", __version__)
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "flash-attn", "numpy", "safetensors", "diffusers", "matplotlib", "scikit-learn"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/dim]")
    cuda = torch.cuda.get_device_name() if device.type == "cuda" else f"none; {torch.get_num_threads()} CPU threads"
    table.add_row("GPU", cuda)
    return table


def _engines_table(device: torch.device) -> Table:
    table = Table("op", "takes", "why", title=f"Engines for bf16 tensors on {device}", title_justify="left")
    for op in ops.__all__:
        if op != "attention":
            table.add_row(op, *_named(choose_backend(device, op)))
            if choose_backend(device, op, training=True) != choose_backend(device, op):
                table.add_row(f"{op}, in training", *_named(choose_backend(device, op, training=True)))
    for head_dim, num_tokens in itertools.product((64, 72), (256, 1024)):
        engine, reason = choose_engine(device, torch.bfloat16, head_dim, num_tokens)
        table.add_row(f"attention, head dim {head_dim}, {num_tokens} tokens", engine, reason)
    return table


def _named(choice: tuple[str, str]) -> tuple[str, str]:
    backend, reason = choice
    return f"triton ({kernels().target()})" if backend == "triton" else backend, reason


def _parity(device: torch.device) -> tuple[bool, str]:
    """A small model with non-zero weights against the float64 reference, through the engines of the table."""
    config = DiTConfig(depth=2, hidden_size=128, num_heads=2, input_size=8, num_classes=10)
    torch.manual_seed(0)
    oracle = reference.DiT(config).eval()
    for parameter in oracle.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    fast = DiT(config).eval().to(device)
    fast.load_state_dict(oracle.state_dict())
    x, t, y = torch.randn(2, *config.input_shape), torch.tensor([10, 900]), torch.tensor([3, 10])
    with torch.inference_mode():
        exact = oracle.double()(x.double(), t, y)
        found = fast(x.to(device), t.to(device), y.to(device)).cpu()
    error = ((found - exact).norm() / exact.norm()).item()
    healthy = error < 1e-5
    verdict = "parity with the float64 reference" if healthy else "NO PARITY with the float64 reference: please report this"
    return healthy, f"{verdict}: relative error {error:.1e} in fp32 on {device}"


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name that ends in .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, but the folder {path.parent} does not exist")
    return path


def _digit(text: str) -> int:
    if not text.isdecimal() or int(text) > 9:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a digit 0..9")
    return int(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer 0..2^64-1")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)
