"""A training step of the whole recipe: forward, hybrid loss, backward, AdamW, average; rivals take turns, a step each.

    python benchmarks/training.py                                    DiT-B/4, batch 8 (on CUDA DiT-XL/2, batch 32)
    python benchmarks/training.py --models DiT-S/2 --batch 32 --rivals eager:bf16 ditfast:bf16 ditfast:bf16:checkpoint

A rival is a model (eager and compile: the reference; ditfast; ditfast-compile), a dtype (bf16 and fp16: autocast over fp32
weights) and perhaps checkpoint, of activations: ditfast keeps the products' outputs, the reference its blocks' inputs.
"""

from __future__ import annotations

from ditfast import interrupt  # acts while the rest is imported

# isort: split
import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import ditfast
from ditfast import DiTConfig, flops, reference, timer
from ditfast.benchmarks.precision import fix_precision
from ditfast.benchmarks.report import COLUMNS, number, print_notes
from ditfast.benchmarks.results import at_least, new_folder, new_results
from ditfast.benchmarks.rows import fill_speed
from ditfast.benchmarks.timing import DeviceLost, describe_failure, interleaved
from ditfast.benchmarks.weights import load, random_weights
from ditfast.config import MODEL_NAMES
from ditfast.devices import add_device_argument, find_device
from ditfast.dtypes import DTYPES
from ditfast.free_memory import shortage_exits, why_too_large
from ditfast.interrupt import keeping, shielding_children
from ditfast.terminal import HelpFormatter, make_console, new_table, print_table, say, track_progress
from ditfast.training import TrainSettings
from ditfast.training.averages import Averages
from ditfast.training.data import Batch, Pairs
from ditfast.training.objective import Objective
from ditfast.training.speed import BACKWARD, peak_flops, peak_memory
from ditfast.training.step import Stepper, freeze_label_dropout

JSON = "training.json"
KINDS = ("eager", "compile", "ditfast", "ditfast-compile")
BASELINE = "eager:fp32"
CPU_RIVALS = (BASELINE, "eager:bf16", "compile:bf16", "ditfast:fp32", "ditfast:bf16", "ditfast:bf16:checkpoint")
CUDA_RIVALS = (*CPU_RIVALS, "compile:fp32", "eager:bf16:checkpoint", "compile:bf16:checkpoint", "ditfast-compile:bf16")
STEPS_FOR_MEMORY = 2
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # of the first step's loss, relative to the baseline's


class Rival(NamedTuple):
    kind: str
    dtype: str
    checkpointed: bool

    @classmethod
    def parse(cls, text: str) -> Rival:
        kind, dtype, *more = text.split(":") if ":" in text else (text, "bf16")
        if kind not in KINDS or dtype not in DTYPES or more not in ([], ["checkpoint"]):
            expected = f"KIND:DTYPE or KIND:DTYPE:checkpoint, of {', '.join(KINDS)} and {', '.join(DTYPES)}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return cls(kind, dtype, bool(more))

    def __str__(self) -> str:
        return ":".join([self.kind, self.dtype, *["checkpoint"] * self.checkpointed])


class Training:
    """A rival's model, optimizer and average, and the steps it took."""

    def __init__(self, rival: Rival, config: DiTConfig, batch: int, device: torch.device):
        torch.manual_seed(0)
        weights = random_weights(config, torch.float32, device)
        kind = ditfast.DiT if rival.kind.startswith("ditfast") else reference.DiT
        model = load(kind, config, weights, device, copy=True).train()
        freeze_label_dropout(model)
        if isinstance(model, ditfast.DiT):
            model.checkpoint_activations = rival.checkpointed
        elif rival.checkpointed:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if rival.kind.endswith("compile"):
            model.compile(dynamic=False)
        settings = TrainSettings(steps=10**9, batch=batch, dtype=rival.dtype)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=settings.rate, weight_decay=0.0, fused=True)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(batch, *config.input_shape, generator=generator)
        labels = torch.randint(config.num_classes, (batch,), generator=generator)
        data = Pairs(TensorDataset(latents, labels), config.num_classes)
        self.batch = Batch(0, list(range(batch)), latents, labels)
        self.stepper = Stepper(
            model,
            config,
            data,
            Objective(settings, config),
            optimizer,
            Averages(trained, settings.ema),
            settings,
            slice(0, batch),
            device,
        )
        self.steps = 0

    def step(self) -> float:
        """The loss. Reading it waits for the device."""
        report = self.stepper.take(self.steps, self.batch)
        self.steps += 1
        return report.parts["loss"]


@dataclass
class Row:
    """One rival; times are of one step."""

    model: str
    rival: str
    batch: int
    device: str
    first_step_s: float
    first_loss: float
    peak_memory_gb: float
    ms_median: float = 0.0
    ms_p20: float = 0.0
    ms_p80: float = 0.0
    images_per_s: float = 0.0
    mfu: float = 0.0
    speedup_over: dict[str, float] = field(default_factory=dict)


def measure(
    model: str, config: DiTConfig, rivals: Sequence[Rival], batch: int, rounds: int, device: torch.device
) -> tuple[list[Row], list[str]]:
    """Let rivals take turns; return their rows, and remarks on those that failed.

    Raises:
        DeviceLost: no later call of CUDA can succeed.
    """
    rows: list[Row] = []
    trainings: dict[str, Training] = {}
    remarks: list[str] = []
    for rival in rivals:
        if sizes := why_too_large(_least_peak(rival, config, batch), device):
            remarks.append(f"{model}: {rival} skipped, as it takes {sizes}: take a smaller --batch")
            continue
        try:
            memory = _peak_memory(rival, config, batch, device)
            training = Training(rival, config, batch, device)
            start = time.perf_counter()
            loss = training.step()
        except Exception as error:  # a rival that cannot run must not take the others with it
            remarks.append(describe_failure(model, str(rival), error))
            continue
        trainings[str(rival)] = training
        rows.append(Row(model, str(rival), batch, device.type, time.perf_counter() - start, loss, memory / 1e9))

    def seconds(rival: str, i: int) -> float:
        progress.update(rival)
        return timer.host_seconds(trainings[rival].step, device)[1]

    def fail(rival: str, error: Exception) -> None:
        remarks.append(describe_failure(model, rival, error))
        del trainings[rival]

    with track_progress("training", rounds + 1, "rounds") as progress:
        times = interleaved(trainings, rounds + 1, seconds, fail, progress.advance)
    times = {rival: own[1:] for rival, own in times.items()}  # the first round warms up
    rows = [row for row in rows if row.rival in times]
    operations = (1 + BACKWARD) * flops.flops(config) * batch
    for row in rows:
        dtype = Rival.parse(row.rival).dtype
        row.mfu = operations / fill_speed(row, times) / peak_flops(device, DTYPES[dtype])
        baseline, allowed = rows[0].first_loss, LARGEST_DIFFERENCE[dtype]
        if not abs(row.first_loss - baseline) <= allowed * abs(baseline):
            remarks.append(f"{model}: {row.rival} begins with the loss {row.first_loss:.6f}, {rows[0].rival} {baseline:.6f}")
    return rows, remarks


def _least_peak(rival: Rival, config: DiTConfig, batch: int) -> int:
    """Return bytes that a rival's step surely takes; what is kept by compilers and others' checkpointing is not counted."""
    kept = 0 if rival.checkpointed or rival.kind not in ("eager", "ditfast") else batch
    return flops.training_bytes(config, kept, DTYPES[rival.dtype], "keep").least_peak(accumulates=False)


def _peak_memory(rival: Rival, config: DiTConfig, batch: int, device: torch.device) -> int:
    """Bytes, of a process that does nothing else."""
    with shielding_children():
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        try:
            return pool.apply(_steps_of_their_own, (rival, config, batch, str(device), torch.get_num_threads()))
        except torch.AcceleratorError as error:  # ends that process's use of the GPU, not ours
            raise RuntimeError(f"in a process of its own: {error}") from error


def _steps_of_their_own(rival: Rival, config: DiTConfig, batch: int, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    fix_precision()
    place = find_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    training = Training(rival, config, batch, place)
    for _ in range(STEPS_FOR_MEMORY):
        training.step()
    return peak_memory(place)


def _table(rows: Sequence[Row]) -> Table:
    table = new_table("", right=("ms", "p20", "p80", "images/s", "MFU", "GB", "1st s", "x"))
    for row in rows:
        speed = [number(value) for value in (row.ms_median, row.ms_p20, row.ms_p80, row.images_per_s)]
        more = (f"{row.mfu:.0%}", f"{row.peak_memory_gb:.1f}", number(row.first_step_s))
        style = "bold" if row.rival.startswith("ditfast") else None
        table.add_row(row.rival, *speed, *more, f"{row.speedup_over.get(rows[0].rival, 1.0):.2f}", style=style)
    return table


def _print(console: Console, rows: Sequence[Row]) -> None:
    print_table(_table(rows), console, f"{rows[0].model}, batch {rows[0].batch}: a training step")
    say(
        "MFU: three forwards' products over what the device's take. GB: the most memory, of a process of its own. 1st s: the "
        f"first step. x: times as fast as {rows[0].rival}, the median of the rounds' ratios.",
        console,
    )


@shortage_exits("benchmarks/training.py")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/training.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, metavar="NAME", help="default: DiT-XL/2; on a CPU DiT-B/4")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks, instead of the model's own")
    parser.add_argument("--batch", type=int, metavar="N", help="images; default: 32; on a CPU 8")
    parser.add_argument("--rivals", nargs="+", type=Rival.parse, metavar="KIND:DTYPE[:checkpoint]", help="default: all of them")
    parser.add_argument(
        "--rounds", type=at_least(2), default=7, metavar="N", help="steps that count, at least 2; default %(default)s"
    )
    add_device_argument(parser)
    parser.add_argument("--out", type=new_folder("training.json"), metavar="DIR", help="writes training.json there")
    args = parser.parse_args(argv)
    fix_precision()
    on_cuda = args.device.type == "cuda"
    models, batch = args.models or ["DiT-XL/2" if on_cuda else "DiT-B/4"], args.batch or (32 if on_cuda else 8)
    rivals = args.rivals or [Rival.parse(text) for text in (CUDA_RIVALS if on_cuda else CPU_RIVALS)]
    console = make_console(piped=COLUMNS)
    results = new_results("training", args.device)
    paths = [] if args.out is None else [args.out / JSON]
    for model in models:
        config = DiTConfig.from_name(model)
        if args.depth is not None:
            config = dataclasses.replace(config, depth=args.depth)
        try:
            with keeping(
                lambda: f"rows in {paths[0]}: {len(results.rows)}" if paths and results.rows else "no row was written"
            ):
                rows, remarks = measure(model, config, rivals, batch, args.rounds, args.device)
        except DeviceLost as error:
            results.notes.append(str(error))
            break
        results.rows += rows
        results.notes += remarks
        if rows:
            _print(console, rows)
        results.write(*paths)
    print_notes(console, results.notes)
    results.write(*paths)
    return 1 if results.notes else 0


if __name__ == "__main__":
    sys.exit(interrupt.run("benchmarks/training.py", main))
