"""Speed of DiT forwards: ditfast against eager PyTorch, torch.compile and diffusers, checked against float64 first.

    ditfast bench                      ten minutes on a GPU, four on two CPU cores; also python benchmarks/bench.py
    ditfast bench --full               all models, 512 pixels, max-autotune
    ditfast bench --save               and keep the result in benchmarks/results
    ditfast bench --models DiT-S/2 DiT-B/4 --batch 1 8 --dtype bf16 fp32
    ditfast bench --models DiT-S/8 DiT-S/4:8 DiT-XL/2@512:4
                                       each with a batch of its own, --batch for the others
    ditfast bench --checkpoint DiT-XL-2-256x256.pt --batch 8

Writes bench.json, bench.txt (the tables) and two plots into --out; JSON and tables after each row. Rivals run interleaved,
round by round, so that a machine whose clock drifts slows all of them; ratios are medians of each round's ratio. torch.compile
compiles ahead in parallel processes, while nothing is timed. The reference's attention is torch's SDPA, as in the official
code with a current timm: eager is no unfused-attention baseline. max-autotune is the reference under torch.compile's
"max-autotune-no-cudagraphs". diffusers is its own class with the same weights, ditfast-swapped that class after
ditfast.accelerate; both are held to diffusers' arithmetic. ditfast+table is ditfast with the modulation computed beforehand, as
sampling does; ditfast-int8, and with +table, has the blocks' products in int8 and all else at --dtype (CPU). openvino (CPU) is
the reference converted by OpenVINO at --dtype, openvino-int8 that quantized by nncf. OpenVINO and int8 are timed up to an error
of 0.3, which stands beside each speed.

On CUDA each rival also runs as NAME+graph, captured as a CUDA graph, from inputs that the L2 cache does not hold; the GPU's own
peaks (a copy, a large product) are measured first. A row there has, beside its times: host_us (until the call returns, device
idle before), launches (kernels of a forward, at a model's first batch), peak_memory_gb, joules_per_image, watts and clock_mhz
(over half a second of forwards), clock_mhz_before and clock_mhz_after (in its first and last round), slowed_by (what held the
clocks down), floor_ms (the roofline bound, ditfast.flops.floor_ms, at the data sheet's peaks) and floor_ms_measured (at the
measured ones), and roofline_share and roofline_share_measured, those bounds over the median. What a missing tool (NVML, the
profiler) would tell is null, and a note says why.
"""

from __future__ import annotations

from ditfast import interrupt  # acts while the rest is imported

# isort: split
import argparse
import functools
import importlib.util
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from ditfast import CheckpointError, DiTConfig, flops
from ditfast.benchmarks.ahead import Job, compile_ahead, count_processes, is_compiled, needs_compiling
from ditfast.benchmarks.estimate import Estimator, constants_help
from ditfast.benchmarks.gauges import Gauges
from ditfast.benchmarks.gpu import open_gpu
from ditfast.benchmarks.plots import save_plots
from ditfast.benchmarks.precision import fix_precision
from ditfast.benchmarks.report import COLUMNS, print_beside_speed, print_notes, print_speed, text_of
from ditfast.benchmarks.results import Results, at_least, new_folder, new_results, results_path
from ditfast.benchmarks.rivals import (
    COMPILED,
    GRAPH,
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
from ditfast.benchmarks.timing import DeviceLost, bench_case, count_launches, describe_failure
from ditfast.commands.arguments import positive
from ditfast.config import MODEL_NAMES
from ditfast.devices import add_device_argument
from ditfast.dtypes import DTYPES
from ditfast.files import free_path, whole_file
from ditfast.flops.devices import spec_of
from ditfast.flops.memory import sampling_bytes
from ditfast.free_memory import shortage_exits, why_too_large
from ditfast.interrupt import keeping
from ditfast.ops.cpu_products import SLOW_DTYPES
from ditfast.terminal import HelpFormatter, Tracker, make_console, say, track_progress

QUICK_MODELS = {"cpu": ["DiT-S/8", "DiT-S/2", "DiT-B/4"]}
QUICK_MODELS["cuda"] = ["DiT-XL/2", "DiT-B/2", "DiT-S/2", "DiT-L/4", "DiT-S/8"]
FULL_MODELS = [*MODEL_NAMES, "DiT-XL/2@512"]
BATCHES = {"cpu": [1], "cuda": [1, 8, 32, 128]}
COMPILED_BATCHES = (1, 32)  # of a run without --rivals or --full
QUICK_RIVALS = ["eager", "compile", "diffusers", "ditfast"]
FULL_RIVALS = ["eager", "compile", "max-autotune", "diffusers", "ditfast", "ditfast-swapped"]
FEWEST_ROUNDS = 5
DEFAULT_OUT = Path("bench-results")
JSON, TABLES = "bench.json", "bench.txt"
PROGRAM = "ditfast bench"  # however it was started


class Plan(NamedTuple):
    """A case to run, and its rivals."""

    case: Case
    rivals: list[str]
    make: functools.partial[Case]  # for a process that compiles

    def jobs(self) -> Iterator[Job]:
        for rival in self.rivals:
            if not rival.endswith(GRAPH) and needs_compiling(rival, self.case.device):
                yield Job(self.case.title, self.make, rival, self.case.config.depth)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog="\n".join(constants_help()),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", type=_wanted, metavar="NAME", help="DiT-S/2, DiT-S/2:8 for a batch of 8, DiT-XL/2@512 for 512px"
    )
    parser.add_argument("--full", action="store_true", help="all models, 512 pixels, every torch.compile: hours on a GPU")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights to time instead of random ones; any layout")
    parser.add_argument(
        "--batch", nargs="+", type=positive, metavar="N", help="of a model without one; default: 1; on CUDA 1 8 32 128"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16; fp32 on a CPU that multiplies no bf16")
    parser.add_argument(
        "--rivals", nargs="+", choices=RIVALS, metavar="NAME", help=f"of {', '.join(RIVALS)}; default: what fits the device"
    )
    parser.add_argument(
        "--rounds", type=at_least(FEWEST_ROUNDS), default=7, help=f"at least {FEWEST_ROUNDS}; default %(default)s"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--out", type=new_folder(JSON), metavar="DIR", help=f"default {DEFAULT_OUT}, with a number if it is taken"
    )
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/DEVICE-DATE.json")
    args = parser.parse_args(argv)
    if args.checkpoint is not None and args.models:
        parser.error("argument --checkpoint: not allowed with --models")
    kind = args.device.type
    args.models = args.models or [(model, None) for model in (FULL_MODELS if args.full else QUICK_MODELS[kind])]
    args.batch = args.batch or BATCHES[kind]
    args.notes = []
    if args.dtype is None:
        slow = kind == "cpu" and torch.bfloat16 in SLOW_DTYPES
        args.dtype = ["fp32" if slow else "bf16"]
        args.notes += ["dtype: fp32, since this CPU has no bf16 matmul (--dtype bf16 times torch's loops)"] * slow
    args.out = args.out or new_folder(JSON)(str(free_path(DEFAULT_OUT)))
    return args


@shortage_exits(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    missing = [module for module in ("matplotlib", "sklearn") if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"{PROGRAM}: needs {' and '.join(missing)}: pip install -e '.[bench]' (or 'ditfast[bench]')")
    console = make_console(piped=COLUMNS)
    fix_precision()
    gpu = open_gpu(args.device)
    command = shlex.join([*PROGRAM.split(), *(sys.argv[1:] if argv is None else argv)])
    results = new_results("bench", args.device, command)
    try:
        plans, notes = _plans(args)
    except CheckpointError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    results.notes += [*args.notes, *notes]
    gauges = None if gpu is None else Gauges(gpu, spec_of(args.device))
    if gauges is not None:
        results.machine |= gauges.describe()
    say(results.describe(), console)
    print_notes(console, results.notes)
    run = _Run(args, results, gauges, console)
    with keeping(lambda: f"rows in {args.out / JSON}: {len(results.rows)}"):
        run.all(plans)
    print_beside_speed(console, results.rows)
    print_notes(console, results.notes[len(args.notes) + len(notes) :])
    written = [*run.paths, args.out / TABLES, *save_plots(args.out, results.rows)]
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)  # a path stays in one piece
    return 0 if results.rows and all(row.parity for row in results.rows) and not run.lost else 1


class _Run:
    """A run under way, whose files hold every row that is final."""

    def __init__(self, args: argparse.Namespace, results: Results, gauges: Gauges | None, console: Console):
        self.args, self.results, self.gauges, self.console = args, results, gauges, console
        self.rows: list[Row] = results.rows
        self.paths = [args.out / JSON]
        if args.save:
            self.paths.append(results_path(str(results.machine["device"]), results.date))
            self.paths[-1].parent.mkdir(exist_ok=True)
        self.lost = False

    def all(self, plans: Sequence[Plan]) -> None:
        """Compile ahead, run all cases, then profile."""
        plans = [plan for plan in plans if self._fits(plan.case)]
        new = [job for plan in plans for job in plan.jobs() if not is_compiled(job)]
        processes = count_processes(self.args.device, len(new))
        spec = None if self.gauges is None else self.gauges.data_sheet
        estimator = Estimator(self.args.device, spec, self.args.rounds)
        seconds = estimator.start() + sum(estimator.case(plan.case, plan.rivals) for plan in plans)
        seconds += estimator.compiling([(job.blocks, job.rival == "max-autotune") for job in new], processes)
        self.results.machine["estimated_s"] = round(seconds, 1)
        say(estimator.describe(seconds), self.console)
        self._save()
        start = time.monotonic()
        with track_progress("bench", len(plans) + len(new), console=self.console) as progress:
            if new:
                progress.update(f"compiling {len(new)} models in {processes} processes")
            try:
                for job, error in compile_ahead(new, processes):
                    if error is not None:
                        self._note(f"{job.title}: {job.rival} was not compiled ahead: {error}")
                    progress.advance()
                for plan in plans:
                    self._case(plan, progress)
                self._profile(plans, progress)
            except DeviceLost as error:
                self.lost = True
                self._note(str(error))
            except KeyboardInterrupt:
                self._note("interrupted: later rows are missing")
                raise
        self.results.machine["taken_s"] = round(time.monotonic() - start, 1)
        self._save()

    def _fits(self, case: Case) -> bool:
        weights = case.dtype.itemsize * flops.parameters(case.config)
        sizes = why_too_large(weights + sampling_bytes(case.config, case.batch, case.dtype, "cuda"), case.device)
        if sizes:
            self._note(f"{case.title}: skipped, as it takes {sizes}: take a smaller batch")
        return not sizes

    def _case(self, plan: Plan, progress: Tracker) -> None:
        case = plan.case

        def show(phase: str) -> None:
            progress.update(f"{case.title}: {phase}")

        try:
            rows, remarks = bench_case(case, plan.rivals, self.args.rounds, show, self.gauges, self._finish)
        except DeviceLost:
            raise
        except Exception as error:  # one case must not take the others with it
            rows, remarks = [], [describe_failure(case.title, "all rivals", error)]
        for remark in remarks:
            self._note(remark)
        if self.gauges is not None:
            self.gauges.gpu.release_cache()
        if rows:
            print_speed(self.console, rows)
        progress.advance()

    def _finish(self, row: Row) -> None:
        self.rows.append(row)
        self._save()

    def _profile(self, plans: Sequence[Plan], progress: Tracker) -> None:
        """Count launches of each model's first case; after all captures, of which a profiler has been seen to break some."""
        if self.gauges is None:
            return
        for plan in {(plan.case.model, plan.case.dtype): plan for plan in reversed(plans)}.values():
            case = plan.case
            progress.update(f"{case.title}: launches")
            rows = [row for row in self.rows if (row.model, row.dtype, row.batch) == (case.model, case.dtype_name, case.batch)]
            try:
                found = count_launches(case, list(dict.fromkeys(kind_of(row.rival) for row in rows)), self.gauges)
            except Exception as error:
                self._note(describe_failure(case.title, "the profiler", error))
                continue
            for row in rows:
                row.launches = found[kind_of(row.rival)]
            self._save()

    def _note(self, note: str) -> None:
        self.results.notes.append(note)
        self._save()

    def _save(self) -> None:
        if self.gauges is not None:
            self.results.notes += [note for note in self.gauges.notes if note not in self.results.notes]
        self.results.write(*self.paths)
        with whole_file(self.args.out / TABLES) as temporary:
            temporary.write_text(text_of(self.rows, self.results.notes), "utf-8")


def _plans(args: argparse.Namespace) -> tuple[list[Plan], list[str]]:
    """Return what to run, and a note for each rival that cannot."""
    rivals, notes = available_rivals(
        args.rivals or (FULL_RIVALS if args.full else QUICK_RIVALS), on_gpu=args.device.type == "cuda"
    )
    makers: list[functools.partial[Case]] = []
    for dtype in args.dtype:
        if args.checkpoint is not None:
            makers += [functools.partial(checkpoint_case, args.checkpoint, n, args.device, dtype) for n in args.batch]
            continue
        for model, own in args.models:
            batches = args.batch if own is None else [own]
            makers += [functools.partial(random_case, model, config_of(model), n, args.device, dtype) for n in batches]
        makers.append(functools.partial(digits_case, dtype, args.device))
    cases = [(make(), make) for make in makers]
    return [Plan(case, _possible(case, rivals, args), make) for case, make in cases], notes


def config_of(model: str) -> DiTConfig:
    """Return the config of ``"DiT-XL/2"``, or with its pixels, ``"DiT-XL/2@512"``."""
    name, _, pixels = model.partition("@")
    return DiTConfig.from_name(name, image_size=int(pixels or 256))


def _possible(case: Case, rivals: list[str], args: argparse.Namespace) -> list[str]:
    """Leave out diffusers where it has no such model, and torch.compile at batches for which nobody asked."""
    names = rivals
    if case.config.conditioning != "adaln_zero":
        names = [name for name in names if kind_of(name) not in IN_DIFFUSERS]
    if args.rivals is None and not args.full and case.batch not in COMPILED_BATCHES:
        names = [name for name in names if kind_of(name) not in COMPILED]
    return names


def _wanted(text: str) -> tuple[str, int | None]:
    """Return a model and its own batch; None: every --batch."""
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
    return model, positive(batch) if colon else None


if __name__ == "__main__":
    raise SystemExit(interrupt.run(PROGRAM, main))
