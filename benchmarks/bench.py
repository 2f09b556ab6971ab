"""How fast ditfast is: DiT forwards against eager PyTorch and torch.compile, checked against float64 before they are timed.

    python benchmarks/bench.py                                     what fits this machine
    python benchmarks/bench.py --models DiT-S/2 DiT-B/4 --batch 1 8 --dtype bf16 fp32
    python benchmarks/bench.py --models DiT-XL/2@512 --batch 32 --rivals compile ditfast --rounds 15 --out results
    python benchmarks/bench.py --models DiT-S/8 DiT-S/4:8 DiT-XL/2@512:4    each with a batch of its own, --batch for the others
    python benchmarks/bench.py --checkpoint DiT-XL-2-256x256.pt --batch 8

Writes bench.json, throughput.png and ratios.png into --out. Rivals run interleaved, round by round, so that a machine whose
clock drifts slows all of them; ratios are medians of each round's ratio. The reference's attention is torch's SDPA, as in the
official code with a current timm: eager is no unfused-attention baseline. max-autotune is the reference under torch.compile's
"max-autotune-no-cudagraphs". diffusers is its own class with the same weights, ditfast-swapped that class after
ditfast.accelerate; both are held to diffusers' arithmetic, and unless --rivals says otherwise take part for the first model.
ditfast+table is ditfast with the modulation computed beforehand, as sampling does; ditfast-int8, and with +table, has the
blocks' products in int8 and all else at --dtype (CPU). openvino (CPU) is the reference converted by OpenVINO at --dtype,
openvino-int8 that quantised by nncf. OpenVINO and int8 are timed up to an error of 0.3, which stands beside each speed.

On CUDA each rival also runs as NAME+graph, captured as a CUDA graph, from inputs that the L2 cache does not hold; the GPU's own
ceilings (a copy, a large product) are measured first. bench.json's environment has them; a row there has, beside its times:
first_call_s (compiles, tunes, captures), launches (kernels of a forward), peak_memory_gb, joules_per_image, watts and clock_mhz
(over a second of forwards), clock_mhz_before and clock_mhz_after its rounds, slowed_by (what held the clocks down), floor_ms
(ditfast.flops.floor_ms at the data sheet's peaks) and floor_ms_measured (at the ceilings), and roofline_share and
roofline_share_measured, those floors over the median. What a missing tool (NVML, the profiler) would tell is null, and a note
says why. The default run takes hours there, most of them max-autotune's: name a few models, batch sizes or rivals.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from ditfast import CheckpointError
from ditfast.benchmarks.environment import describe
from ditfast.benchmarks.gauges import Gauges, first_line
from ditfast.benchmarks.gpu import Gpu, open_gpu
from ditfast.benchmarks.plots import save_plots
from ditfast.benchmarks.predicted_tables import config_of
from ditfast.benchmarks.report import print_tables, save_json
from ditfast.benchmarks.rivals import (
    IN_DIFFUSERS,
    RIVALS,
    Case,
    available_rivals,
    checkpoint_case,
    digits_case,
    kind_of,
    random_case,
)
from ditfast.benchmarks.rows import Row
from ditfast.benchmarks.timing import bench_case, progress_bar
from ditfast.config import MODEL_NAMES
from ditfast.devices import add_device_argument
from ditfast.dtypes import DTYPES
from ditfast.prediction import spec_of

CPU_MODELS = [name for name in MODEL_NAMES if name.startswith(("DiT-S", "DiT-B"))]
CUDA_MODELS = [*MODEL_NAMES, "DiT-XL/2@512"]
CPU_RIVALS = ["eager", "compile", "ditfast"]
CUDA_RIVALS = ["eager", "compile", "max-autotune", "diffusers", "ditfast"]
FEWEST_ROUNDS = 5


class Wanted(NamedTuple):
    """A model to time."""

    model: str
    batch: int | None = None  # None: every --batch


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", type=_wanted, metavar="NAME", help="DiT-S/2, DiT-S/2:8 for a batch of 8, DiT-XL/2@512 for 512px"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights to time instead of random ones; any layout")
    parser.add_argument(
        "--batch", nargs="+", type=_positive, metavar="N", help="of a model without one; default: 1; on CUDA 1 8 32 128"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, help="default: what fits the device")
    parser.add_argument("--rounds", type=_rounds, default=7, help=f"at least {FEWEST_ROUNDS}; default %(default)s")
    add_device_argument(parser)
    parser.add_argument("--out", type=_folder, default="bench-results", metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    if args.checkpoint is not None and args.models:
        parser.error("argument --checkpoint: not allowed with --models")
    on_cuda = args.device.type == "cuda"
    args.models = args.models or [Wanted(model) for model in (CUDA_MODELS if on_cuda else CPU_MODELS)]
    args.batch = args.batch or ([1, 8, 32, 128] if on_cuda else [1])
    return args


def main(argv: Sequence[str] | None = None, gpu: Gpu | None = None) -> int:
    """``gpu`` stands in for that of --device."""
    args = parse_arguments(argv)
    missing = [module for module in ("matplotlib", "sklearn") if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"bench needs {' and '.join(missing)}: pip install -e '.[bench]' (or 'ditfast[bench]')")
    console = Console(width=max(112, Console().width))
    torch.backends.cudnn.allow_tf32 = False  # no rival gets to round its fp32 convolution
    gpu = gpu or open_gpu(args.device)
    environment = describe(args.device)
    environment["command"] = shlex.join(["python", "benchmarks/bench.py", *(sys.argv[1:] if argv is None else argv)])
    gauges = None if gpu is None else Gauges(gpu, spec_of(args.device))
    if gauges is not None:
        environment |= gauges.describe()
    console.print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None), highlight=False)
    try:
        cases, notes = _cases(args, on_gpu=gpu is not None)
    except CheckpointError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    report = args.out / "bench.json"
    with progress_bar(console) as progress:
        task = progress.add_task("bench", total=len(cases), phase="")
        for case, rivals in cases:
            if not console.is_terminal:
                console.print(case.title, highlight=False)

            def show(phase: str, case: Case = case) -> None:
                progress.update(task, phase=f"{case.title}: {phase}")

            try:
                found, remarks = bench_case(case, rivals, args.rounds, show, gauges)
                rows += found
                notes += remarks
            except torch.OutOfMemoryError:
                notes.append(f"{case.title}: skipped, out of memory")
            except Exception as error:  # one case must not take the others with it
                notes.append(f"{case.title}: skipped, {type(error).__name__}: {first_line(error)}")
            if gpu is not None:
                gpu.release_cache()
            save_json(report, environment, rows, _all_notes(notes, gauges))
            progress.advance(task)
    print_tables(console, rows)
    for note in _all_notes(notes, gauges):
        console.print(f"note: {note}", highlight=False)
    written = [report, *save_plots(args.out, rows)]
    console.print("wrote " + ", ".join(str(path) for path in written), highlight=False)
    return 0 if rows and all(row.parity for row in rows) else 1


def _all_notes(notes: list[str], gauges: Gauges | None) -> list[str]:
    return notes if gauges is None else [*notes, *gauges.notes]


def _cases(args: argparse.Namespace, *, on_gpu: bool) -> tuple[list[tuple[Case, list[str]]], list[str]]:
    """What to run, each with its rivals, and a note for each rival that cannot."""
    wanted = args.rivals or (CUDA_RIVALS if on_gpu else CPU_RIVALS)
    rivals, notes = available_rivals(wanted, on_gpu=on_gpu)
    more, _ = available_rivals(wanted if args.rivals else [*wanted, *IN_DIFFUSERS], on_gpu=on_gpu)
    if args.checkpoint is not None:
        first = [checkpoint_case(args.checkpoint, n, args.device, dtype) for dtype in args.dtype for n in args.batch]
        others = []
    else:
        cases = [
            random_case(model, config_of(model), batch, args.device, dtype)
            for (model, own), dtype in itertools.product(args.models, args.dtype)
            for batch in (args.batch if own is None else [own])
        ]
        first = [case for case in cases if case.model == args.models[0].model]
        others = [case for case in cases if case.model != args.models[0].model]
        others += [digits_case(dtype, args.device) for dtype in args.dtype]
    pairs = [(case, _possible(case, more)) for case in first] + [(case, _possible(case, rivals)) for case in others]
    return pairs, notes


def _possible(case: Case, rivals: list[str]) -> list[str]:
    in_diffusers = case.config.conditioning == "adaln_zero"
    return [name for name in rivals if in_diffusers or kind_of(name) not in IN_DIFFUSERS]


def _wanted(text: str) -> Wanted:
    model, colon, batch = text.partition(":")
    name, at, pixels = model.partition("@")
    if name not in MODEL_NAMES or (at and not pixels.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected one of {', '.join(MODEL_NAMES)}, or with @512 behind for 512px, :8 for a batch of 8"
        )
    try:
        config_of(model)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}: {error}") from error
    return Wanted(model, _positive(batch) if colon else None)


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


if __name__ == "__main__":
    raise SystemExit(main())
