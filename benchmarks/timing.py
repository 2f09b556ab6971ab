"""Parity first, then interleaved rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from ditfast import flops

from .rivals import Case, Run

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ORACLE_SAMPLES = (0, 1, -2, -1)  # of the batch: samples are independent, and float64 is slow on a GPU
SHORTEST_ROUND_S = 0.05


@dataclass
class Row:
    """One rival on one case. Times are of one forward of the whole batch; they are None where parity is red."""

    model: str
    rival: str
    dtype: str
    batch: int
    device: str
    gmacs: float
    gflops: float
    parameters: int
    error: float
    allowed_error: float
    parity: bool
    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    images_per_s: float | None = None
    tflops_per_s: float | None = None
    speedup_over: dict[str, float] = field(default_factory=dict)


def bench_case(case: Case, names: list[str], rounds: int, show: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """The rows of one case and remarks on rivals that failed; ``show`` is told each phase."""
    show("float64 reference")
    x, t, y = case.inputs()
    compared = torch.tensor(sorted({i % case.batch for i in ORACLE_SAMPLES}), device=case.device)
    with torch.inference_mode():
        exact = case.reference(torch.float64)(x[compared].double(), t[compared], y[compared])
        eager_error = _error(case.reference()(x[compared], t[compared], y[compared]), exact)
        allowed = 1.1 * eager_error + UNIT_ROUNDOFF[case.dtype]
        rows: list[Row] = []
        runs: dict[str, Run] = {}
        remarks = []
        for name in names:
            show(f"{name}: first call and parity")
            try:
                run = case.rival(name, runs)
                row = _row(case, name, _error(run(x, t, y)[compared], exact), allowed)
            except Exception as error:  # a rival that cannot run must not take the others with it
                first_line = str(error).strip().partition("\n")[0]
                remarks.append(f"{case.title}: {name} failed: {type(error).__name__}: {first_line}")
                if case.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            rows.append(row)
            if row.parity:
                runs[name] = run
            else:
                remarks.append(f"{case.title}: {name} is off by {row.error:.1e}, {allowed:.1e} allowed; not timed")
        if runs:
            times = _interleaved(runs, (x, t, y), case.device, rounds, show)
            for row in rows:
                if row.rival in times:
                    fill(row, times)
    return rows, remarks


def _interleaved(
    runs: dict[str, Run], inputs: tuple[Tensor, ...], device: torch.device, rounds: int, show: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds for one forward, a value each round; who begins a round moves on with each."""
    repeats = {}
    for name, run in runs.items():
        _timed(run, inputs, device, 1)
        repeats[name] = max(1, math.ceil(SHORTEST_ROUND_S / _timed(run, inputs, device, 1)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for i in range(rounds):
        show(f"round {i + 1} of {rounds}")
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(_timed(runs[name], inputs, device, repeats[name]))
    return times


def _timed(run: Run, inputs: tuple[Tensor, ...], device: torch.device, repeats: int) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run(*inputs)
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def _row(case: Case, name: str, error: float, allowed: float) -> Row:
    return Row(
        model=case.model,
        rival=name,
        dtype=case.dtype_name,
        batch=case.batch,
        device=case.device.type,
        gmacs=flops.macs(case.config) / 1e9,
        gflops=flops.flops(case.config) / 1e9,
        parameters=flops.parameters(case.config),
        error=error,
        allowed_error=allowed,
        parity=error <= allowed,
    )


def fill(row: Row, times: dict[str, list[float]]) -> None:
    """A row's speed from the seconds a forward of every rival in every round."""
    own = times[row.rival]
    fifths = statistics.quantiles(own, n=5, method="inclusive")
    median = statistics.median(own)
    row.ms_median, row.ms_p20, row.ms_p80 = 1e3 * median, 1e3 * fifths[0], 1e3 * fifths[3]
    row.images_per_s = row.batch / median
    row.tflops_per_s = row.gflops * row.batch / median / 1e3
    row.speedup_over = {
        rival: statistics.median(theirs / mine for theirs, mine in zip(others, own, strict=True))
        for rival, others in times.items()
        if rival != row.rival
    }


def progress_bar(console: Console) -> Progress:
    columns = (SpinnerColumn(), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[phase]}"))
    return Progress(*columns, console=console, transient=True)
