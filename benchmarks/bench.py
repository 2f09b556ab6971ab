"""How fast ditfast is: DiT forwards against eager PyTorch and torch.compile, checked against float64 before they are timed.

    python benchmarks/bench.py                                     what fits this machine
    python benchmarks/bench.py --models DiT-S/2 DiT-B/4 --batch 1 8 --dtype bf16 fp32
    python benchmarks/bench.py --models DiT-XL/2@512 --batch 32 --rivals compile ditfast --rounds 15 --out results
    python benchmarks/bench.py --checkpoint DiT-XL-2-256x256.pt --batch 8

Writes bench.json, throughput.png and ratios.png into --out. Rivals run interleaved, round by round, so that a machine whose
clock drifts slows all of them; ratios are medians of each round's ratio. The first model also runs in diffusers' own class,
before and after ditfast.accelerate. The reference's attention is torch's SDPA, as in
the official code with a current timm: eager is no unfused-attention baseline.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ditfast import CheckpointError, DiTConfig
from ditfast.benchmarks.environment import describe
from ditfast.benchmarks.report import print_tables, save_json, save_plots
from ditfast.benchmarks.rivals import (
    DTYPES,
    RIVALS,
    SWAPPED,
    Case,
    available_rivals,
    checkpoint_case,
    digits_case,
    random_case,
    swapped_case,
)
from ditfast.benchmarks.timing import Row, bench_case, progress_bar
from ditfast.config import MODEL_NAMES

CPU_MODELS = [name for name in MODEL_NAMES if name.startswith(("DiT-S", "DiT-B"))]
CUDA_MODELS = [*MODEL_NAMES, "DiT-XL/2@512"]
FEWEST_ROUNDS = 5


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=_model, metavar="NAME", help="such as DiT-S/2, or DiT-XL/2@512 for 512px")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights to time instead of random ones; any layout")
    parser.add_argument("--batch", nargs="+", type=_positive, metavar="N", help="default: 1; on CUDA 1 8 32 128")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS + SWAPPED, default=[*RIVALS, *SWAPPED])
    parser.add_argument("--rounds", type=_rounds, default=7, help=f"at least {FEWEST_ROUNDS}; default %(default)s")
    parser.add_argument("--device", type=_device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--out", type=_folder, default="bench-results", metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    if args.checkpoint is not None and args.models:
        parser.error("argument --checkpoint: not allowed with --models")
    on_cuda = args.device.type == "cuda"
    args.models = args.models or (CUDA_MODELS if on_cuda else CPU_MODELS)
    args.batch = args.batch or ([1, 8, 32, 128] if on_cuda else [1])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    missing = [module for module in ("matplotlib", "sklearn") if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"bench needs {' and '.join(missing)}: pip install -e '.[bench]' (or 'ditfast[bench]')")
    console = Console(width=max(112, Console().width))
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)  # streams and graphs are made on the current one
    torch.backends.cudnn.allow_tf32 = False  # no rival gets to round its fp32 convolution
    environment = describe(args.device)
    console.print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None), highlight=False)
    rivals, notes = available_rivals(args.rivals, args.device)
    try:
        cases = _cases(args, rivals)
    except CheckpointError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    report = args.out / "bench.json"
    with progress_bar(console) as progress:
        task = progress.add_task("bench", total=len(cases), phase="")
        for case in cases:
            if not console.is_terminal:
                console.print(case.title, highlight=False)

            def show(phase: str, case: Case = case) -> None:
                progress.update(task, phase=f"{case.title}: {phase}")

            try:
                names = [name for name in rivals if name.partition("+")[0] in case.rivals]
                found, remarks = bench_case(case, names, args.rounds, show)
                rows += found
                notes += remarks
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                notes.append(f"{case.title}: skipped, out of memory")
            save_json(report, environment, rows, notes)
            progress.advance(task)
    print_tables(console, rows)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    written = [report, *save_plots(args.out, rows)]
    console.print("wrote " + ", ".join(str(path) for path in written), highlight=False)
    return 0 if all(row.parity for row in rows) else 1


def _cases(args: argparse.Namespace, rivals: Sequence[str]) -> list[Case]:
    if args.checkpoint is not None:
        cases = [checkpoint_case(args.checkpoint, n, args.device, dtype) for dtype in args.dtype for n in args.batch]
        first = list(cases)
    else:
        cases = [
            random_case(model, _config(model), batch, args.device, dtype)
            for model, dtype, batch in itertools.product(args.models, args.dtype, args.batch)
        ]
        first = [case for case in cases if case.model == args.models[0]]
        cases += [digits_case(dtype, args.device) for dtype in args.dtype]
    if any(name in SWAPPED for name in rivals):
        cases += [swapped_case(case) for case in first if case.config.conditioning == "adaln_zero"]
    return cases


def _config(model: str) -> DiTConfig:
    name, _, pixels = model.partition("@")
    return DiTConfig.from_name(name, image_size=int(pixels or 256))


def _model(text: str) -> str:
    name, at, pixels = text.partition("@")
    if name not in MODEL_NAMES or (at and not pixels.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected one of {', '.join(MODEL_NAMES)}, or with @512 behind for 512px"
        )
    try:
        DiTConfig.from_name(name, image_size=int(pixels or 256))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}: {error}") from error
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {FEWEST_ROUNDS}")
    return int(text)


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder that can be written: {error}") from error
    return path


def _device(text: str) -> torch.device:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (":" in text and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"got {text!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device(text)


if __name__ == "__main__":
    raise SystemExit(main())
