"""Parity first, then interleaved rounds, then what a GPU tells beside time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from ditfast import flops
from ditfast.config import Flavour
from ditfast.flops import DeviceSpec

from .gauges import Gauges, Inputs, first_line
from .gpu import Gpu
from .rivals import COMPILED, GRAPH, LOOSE_BAR, Case, Run, kind_of, loose
from .rows import Row, fill, new_row

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ORACLE_SAMPLES = (0, 1, -2, -1)  # of the batch: samples are independent, and float64 is slow on a GPU
SHORTEST_ROUND_S = 0.05

Call = Callable[[], object]


class Bar(NamedTuple):
    """What outputs are held to."""

    exact: Tensor
    allowed: float


class First(NamedTuple):
    """A rival's first call."""

    run: Run
    output: Tensor
    seconds: float
    weights: int  # bytes
    peak: int  # bytes, weights among them


def bench_case(
    case: Case, names: list[str], rounds: int, show: Callable[[str], None], gauges: Gauges | None = None
) -> tuple[list[Row], list[str]]:
    """The rows of one case and remarks on rivals that failed; ``show`` is told each phase, ``gauges`` read a GPU."""
    if any(kind_of(name) in COMPILED for name in names):
        torch._dynamo.reset()  # else the cases before this one count against torch.compile's recompilation limit
    gpu = None if gauges is None else gauges.gpu
    inputs = case.inputs()
    compared = torch.tensor(sorted({i % case.batch for i in ORACLE_SAMPLES}), device=case.device)
    with torch.inference_mode():
        bars: dict[str | Flavour, Bar] = {}
        rows: list[Row] = []
        started: dict[str, First] = {}
        remarks = []
        for name in names:
            theirs = case.arithmetic_of(name)
            if theirs.config.flavour not in bars:
                show("float64 reference")
                bars[theirs.config.flavour] = _bar(theirs, [tensor[compared] for tensor in inputs])
            exact, allowed = bars[theirs.config.flavour]
            if loose(name):
                allowed = LOOSE_BAR
            show(f"{name}: first call and parity")
            try:
                first = _start(case, name, started, inputs, gpu)
                row = new_row(case, name, _error(first.output[compared], exact), allowed)
            except Exception as error:  # a rival that cannot run must not take the others with it
                remarks.append(f"{case.title}: {name} failed: {type(error).__name__}: {first_line(error)}")
                if gpu is not None:
                    gpu.release_cache()
                continue
            row.first_call_s = first.seconds
            row.peak_memory_gb = None if gpu is None else first.peak / 1e9
            rows.append(row)
            if row.parity:
                started[name] = first
            else:
                remarks.append(f"{case.title}: {name} is off by {row.error:.1e}, {allowed:.1e} allowed; not timed")
        if started:
            rotation = itertools.cycle([inputs] if gauges is None else gauges.rotated(inputs))
            calls = {name: _call(first.run, rotation) for name, first in started.items()}
            timed = [row for row in rows if row.rival in started]
            if gauges is None:
                _fill_times(timed, calls, None, rounds, show)
            else:
                remarks += _fill_from_gpu(case, timed, calls, gauges, rounds, show)
    return rows, remarks


def _bar(case: Case, inputs: list[Tensor]) -> Bar:
    """1.1 times eager PyTorch's error in the case's dtype, plus one unit roundoff."""
    x, t, y = inputs
    exact = case.reference(torch.float64)(x.double(), t, y)
    return Bar(exact, 1.1 * _error(case.reference()(x, t, y), exact) + UNIT_ROUNDOFF[case.dtype])


def _start(case: Case, name: str, others: dict[str, First], inputs: Inputs, gpu: Gpu | None) -> First:
    before = 0 if gpu is None else gpu.allocated_bytes()
    run = case.rival(name, {other: first.run for other, first in others.items()}, gpu)
    weights = 0 if gpu is None else gpu.allocated_bytes() - before
    if gpu is not None:
        gpu.wait()
        gpu.reset_peak()
    start = time.perf_counter()
    output = run(*inputs)
    if gpu is None:
        return First(run, output, time.perf_counter() - start, 0, 0)
    gpu.wait()
    seconds = time.perf_counter() - start
    if name.endswith(GRAPH):  # whose capture is the one call that allocates
        captured = others[kind_of(name)]
        return First(run, output, seconds, captured.weights, gpu.peak_bytes() - before + captured.weights)
    gpu.reset_peak()
    run(*inputs)
    return First(run, output, seconds, weights, gpu.peak_bytes() - before)


def _call(run: Run, rotation: itertools.cycle[Inputs]) -> Call:
    return lambda: run(*next(rotation))


def _fill_from_gpu(
    case: Case, rows: list[Row], calls: dict[str, Call], gauges: Gauges, rounds: int, show: Callable[[str], None]
) -> list[str]:
    """Times and all else; returns a remark if something held the clocks down."""
    gauges.slowed_by.clear()
    before = gauges.clock_mhz()
    times = _fill_times(rows, calls, gauges.gpu, rounds, show)
    after = gauges.clock_mhz()
    for row in rows:
        show(f"{row.rival}: energy")
        busy = gauges.busy(calls[row.rival], times[row.rival][-1])
        if busy is not None:
            row.joules_per_image, row.watts, row.clock_mhz = busy.joules / row.batch, busy.watts, busy.clock_mhz
    # Last, and of nothing that was captured: a profiler that comes after a capture has been seen to break the graph.
    launches = {name: gauges.launches(call) for name, call in calls.items() if not name.endswith(GRAPH)}
    for row in rows:
        row.launches = launches[kind_of(row.rival)]
        row.clock_mhz_before, row.clock_mhz_after, row.slowed_by = before, after, sorted(gauges.slowed_by)
        row.floor_ms, row.roofline_share = _roofline(row, case, gauges.data_sheet)
        row.floor_ms_measured, row.roofline_share_measured = _roofline(row, case, gauges.ceilings)
    if not gauges.slowed_by:
        return []
    return [f"{case.title}: clocks held down by {', '.join(sorted(gauges.slowed_by))}; {before} MHz before, {after} MHz after"]


def _roofline(row: Row, case: Case, peaks: DeviceSpec | None) -> tuple[float | None, float | None]:
    """The least time that peaks allow, and how near to it a row comes."""
    if peaks is None or row.ms_median is None:
        return None, None
    floor = flops.floor_ms(case.config, case.batch, case.dtype, peaks)
    return floor, floor / row.ms_median


def _fill_times(
    rows: list[Row], calls: dict[str, Call], gpu: Gpu | None, rounds: int, show: Callable[[str], None]
) -> dict[str, list[float]]:
    times = _interleaved(calls, gpu, rounds, show)
    for row in rows:
        fill(row, times)
    return times


def _interleaved(calls: dict[str, Call], gpu: Gpu | None, rounds: int, show: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds for one forward, a value each round; who begins a round moves on with each."""
    repeats = {}
    for name, call in calls.items():
        _timed(call, gpu, 1)
        repeats[name] = max(1, math.ceil(SHORTEST_ROUND_S / _timed(call, gpu, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for i in range(rounds):
        show(f"round {i + 1} of {rounds}")
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(_timed(calls[name], gpu, repeats[name]))
    return times


def _timed(call: Call, gpu: Gpu | None, repeats: int) -> float:
    if gpu is not None:
        return gpu.seconds(call, repeats) / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def progress_bar(console: Console) -> Progress:
    columns = (SpinnerColumn(), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[phase]}"))
    return Progress(*columns, console=console, transient=True)
