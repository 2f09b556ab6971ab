"""Host time of a DiT: microseconds until a forward, a training step or an op returns, beside those of eager PyTorch.

    python benchmarks/host.py                              12 blocks of width 64, batch 1: some minutes
    python benchmarks/host.py --quick                      without torch.compile and diffusers, fewer rounds
    python benchmarks/host.py --models DiT-S/8 --depth 4 --baselines diffusers --out host-results

Without a GPU, kernels are compiled for the simulator of the clone's tests (tests/ptxsim), and the call that enqueues a
compiled kernel does nothing: checks, plans, allocations, grids and arguments count, as on a GPU. ATen's kernels do compute,
which small tensors keep short. On CUDA everything is real; a sample begins with an idle device and launches too little to
fill its queue. ditfast takes its Triton kernels everywhere, also with 1 and with 28 linears that have to be called, as LoRA's
have. A step is forward, loss and backward, without an optimizer.

One thread, one process; cases take turns in random order, round by round. "us" is wall time, "cpu us" the calling thread's
CPU time, both medians. "x" is the median of the rounds' ratios to eager PyTorch (an op's: to ATen's layer_norm on the
model's tokens), "95%" the interval of that median, "cpu x" the ratio of CPU times. A loss, the sum of all outputs, stands
between an op and its backward ("+back"). Writes host.json and host.png into --out.

With --budget SECONDS cases are prepared (compiled) in this order, while three fifths of it last, and the others are left out:
forward and step of ditfast and of eager PyTorch; ops; ops with gradients; with their backward; linears that are called;
diffusers; torch.compile.
"""

from __future__ import annotations

from ditfast import interrupt  # acts while the rest is imported

# isort: split
import argparse
import contextlib
import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ditfast import DiTConfig
from ditfast.benchmarks import host_parts
from ditfast.benchmarks.host_cases import (
    BASELINES,
    EAGER,
    FORWARD,
    LAYER_NORM,
    OP,
    OP_BACKWARD,
    OP_GRAD,
    STEP,
    Unusable,
    launches_without_kernels,
)
from ditfast.benchmarks.host_rounds import FEWEST_ROUNDS, CaseBench, Row
from ditfast.benchmarks.precision import fix_precision
from ditfast.benchmarks.report import COLUMNS, number, print_notes
from ditfast.benchmarks.results import at_least, folder, new_results
from ditfast.benchmarks.rivals import GRAPH, available_rivals, random_case
from ditfast.benchmarks.timing import DeviceLost
from ditfast.commands.arguments import positive
from ditfast.config import MODEL_NAMES
from ditfast.devices import add_device_argument
from ditfast.terminal import HelpFormatter, make_console, new_table, print_table, say, track_progress
from ditfast.threads import one_thread

PROGRAM = "benchmarks/host.py"
TINY = "tiny"
TINY_CONFIG = DiTConfig(depth=12, hidden_size=64, num_heads=2, input_size=4, num_classes=10)
ROUNDS, QUICK_ROUNDS = 100, 20


# ------------------------------------------------------------------------------------------------ report
def print_tables(console: Console, rows: Sequence[Row]) -> None:
    """Print models, ops, where a model's time goes, and thresholds beside what was measured; at most 80 columns."""
    first = rows[0]
    title = f"{first.model}: {first.depth} blocks, batch {first.batch}, {first.dtype} on {first.device}"
    say(f"{title}: host microseconds", console, "bold")
    for table in (_models_table(rows), _ops_table(rows), _parts_table(rows)):
        if table.row_count:
            print_table(table, console)
            say("", console)
    for line in thresholds(rows):
        say(line, console)


def _models_table(rows: Sequence[Row]) -> Table:
    table = new_table("", right=("us", "p20", "p80", "cpu us", f"x {EAGER}", "95%", "cpu x"))
    for row in rows:
        if row.kind in (FORWARD, STEP):
            times = [number(us) for us in (row.us, row.us_p20, row.us_p80, row.cpu_us)]
            interval = "" if row.ratio is None else f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
            table.add_row(f"{row.kind} {row.name}", *times, _ratio(row.ratio), interval, _ratio(row.cpu_ratio))
    return table


def _ops_table(rows: Sequence[Row]) -> Table:
    """Times and ratios to ATen's layer_norm: without gradients, with them wanted, and with the backward."""
    table = new_table("", right=("call", "x", "grad", "x", "+back", "x"))
    found = {(row.kind, row.name): row for row in rows}
    for name in dict.fromkeys(row.name for row in rows if row.kind in (OP, OP_GRAD, OP_BACKWARD)):
        cells: list[str] = []
        for kind in (OP, OP_GRAD, OP_BACKWARD):
            row = found.get((kind, name))
            cells += ["", ""] if row is None else [number(row.us), _ratio(row.ratio)]
        table.add_row(name, *cells)
    return table


def _parts_table(rows: Sequence[Row]) -> Table:
    with_parts = [row for row in rows if row.parts_us]
    table = new_table("", right=[heading for row in with_parts for heading in (f"{row.name} {row.kind}", "")])
    for part in host_parts.PARTS if with_parts else ():
        cells = [(row.parts_us[part], sum(row.parts_us.values())) for row in with_parts]
        table.add_row(part, *(cell for us, whole in cells for cell in (f"{us:.0f}", f"{us / whole:.0%}")))
    return table


def thresholds(rows: Sequence[Row]) -> Iterator[str]:
    """Yield each threshold beside what was measured; the exit status does not depend on them."""
    for row in rows:
        if row.kind in (FORWARD, STEP) and row.most_ratio is not None and row.ratio is not None:
            measured = f"{row.ratio:.2f} of {row.baseline}'s (CPU time: {row.cpu_ratio:.2f})"
            yield f"{row.kind}: {measured}, wanted at most {row.most_ratio}"
    ours = [row for row in rows if row.kind == OP and row.most_us is not None and row.ratio is not None]
    over = [row for row in ours if row.ratio > row.most_ratio or row.us > row.most_us]
    if ours:
        wanted = f"at most {ours[0].most_ratio:g} of {LAYER_NORM}'s and {ours[0].most_us:g} us"
        yield f"ops without gradients: {len(ours) - len(over)} of {len(ours)} take {wanted}"
    yield from (f"  over it: {row.name}, {row.ratio:.2f}, {row.us:.1f} us" for row in over)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# ------------------------------------------------------------------------------------------------ command
def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, prog=PROGRAM)
    names = (TINY, *MODEL_NAMES)
    parser.add_argument("--models", nargs="+", choices=names, default=[TINY], metavar="NAME", help=f"default: {TINY}")
    parser.add_argument("--depth", type=positive, metavar="N", help="blocks, instead of the model's own")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="images; default %(default)s")
    names = (EAGER, *BASELINES)
    parser.add_argument("--baselines", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}; default: all")
    parser.add_argument(
        "--rounds", type=at_least(FEWEST_ROUNDS), metavar="N", help=f"at least {FEWEST_ROUNDS}; default {ROUNDS}"
    )
    parser.add_argument("--quick", action="store_true", help=f"no other baseline than eager, {QUICK_ROUNDS} rounds")
    parser.add_argument("--budget", type=positive, metavar="SECONDS", help="of each model; what does not fit is left out")
    add_device_argument(parser)
    parser.add_argument("--out", type=folder, metavar="DIR", help="writes host.json and host.png there")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.baselines = [name for name in args.baselines or (() if args.quick else BASELINES) if name != EAGER]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    on_cuda = args.device.type == "cuda"
    try:
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise Unusable("TRITON_INTERPRET: got 1, expected it unset: the interpreter launches no compiled kernel")
        with one_thread(), contextlib.nullcontext() if on_cuda else launches_without_kernels():
            return _run(args, shlex.join(["python", PROGRAM, *(sys.argv[1:] if argv is None else argv)]))
    except Unusable as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, command: str) -> int:
    fix_precision()
    console = make_console(piped=COLUMNS)
    results = new_results("host", args.device, command)
    available, notes = available_rivals(args.baselines, on_gpu=args.device.type == "cuda")
    baselines = [name for name in available if not name.endswith(GRAPH)]
    failures: list[str] = []
    with track_progress("host", len(args.models)) as progress:
        for model in args.models:
            config = TINY_CONFIG if model == TINY else DiTConfig.from_name(model)
            config = dataclasses.replace(config, depth=args.depth or config.depth)
            case = random_case(model, config, args.batch_size, args.device, "fp32")
            bench = CaseBench(case, baselines, args.budget, progress.update)
            try:
                bench.prepare()
                rows = bench.run(args.rounds)
            except DeviceLost as error:
                failures.append(str(error))
                break
            results.rows += rows
            failures += bench.failures
            if bench.left_out:
                notes.append(f"{case.title}: left out, over the budget: {', '.join(bench.left_out)}")
            if rows:
                print_tables(console, rows)
            progress.advance()
    if args.out is not None:
        notes += _plot(args.out / "host.png", results.rows)
        results.notes = [*notes, *failures]
        results.write(args.out / "host.json")
    print_notes(console, [*notes, *failures])
    return 1 if failures or not results.rows else 0


def _plot(path: Path, rows: Sequence[Row]) -> list[str]:
    """Draw where the time of the first model's calls goes; return a note if that is impossible."""
    if importlib.util.find_spec("matplotlib") is None:
        return ["host.png: skipped, matplotlib is not installed (pip install matplotlib)"]
    rows = [row for row in rows if row.model == rows[0].model]
    parts = {row.kind: row.parts_us for row in rows if row.parts_us}
    if parts:
        on_cpu = rows[0].device == "cpu"
        eager = {row.kind: row.cpu_us if on_cpu else row.us for row in rows if row.name == EAGER}
        title = f"ditfast, {rows[0].model}, {rows[0].depth} blocks, batch {rows[0].batch}, {rows[0].device}"
        host_parts.save_plot(path, title, parts, eager)
    return []


if __name__ == "__main__":
    raise SystemExit(interrupt.run(PROGRAM, main))
