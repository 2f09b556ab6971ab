"""Parity first, then interleaved rounds, then what a GPU tells beside time. A rival that fails costs its own row."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ditfast import flops, timer
from ditfast.config import DiTConfig, Flavour
from ditfast.flops import DeviceSpec
from ditfast.free_memory import is_out_of_memory
from ditfast.timer import Call

from .gauges import Gauges, first_line
from .rivals import COMPILED, GRAPH, LOOSE_BAR, Case, Run, kind_of, loose
from .rows import Row, fill, new_row

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ORACLE_SAMPLES = (0, 1, -2, -1)  # of a large model's batch: samples are independent, and float64 is slow on a GPU
ORACLE_FLOPS = 1e10  # of a batch that is compared whole: in bf16 the error of a few samples is largely chance
SHORTEST_ROUND_S = 0.05
HOST_CALLS = 11  # of which the host's time is the median
OUT_OF_MEMORY = "out of memory: take a smaller batch, and look with nvidia-smi for others that use the GPU"


class DeviceLost(Exception):
    """An error after which CUDA answers nothing in this process."""


class First(NamedTuple):
    """A rival's first call."""

    run: Run
    output: Tensor
    seconds: float
    weights: int  # bytes
    peak: int  # bytes, weights among them


def bench_case(
    case: Case,
    names: Sequence[str],
    rounds: int,
    show: Callable[[str], None],
    gauges: Gauges | None = None,
    finish: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], list[str]]:
    """Time the rivals of a case; return their rows, and remarks on rivals that failed.

    Args:
        case: to run.
        names: of rivals; ``NAME+graph`` comes after NAME.
        rounds: in which each rival runs once or more.
        show: is told each phase.
        gauges: of a GPU.
        finish: is given each row as soon as nothing in it changes any more, apart from its launches.

    Raises:
        DeviceLost: no later call of CUDA can succeed.
    """
    if any(kind_of(name) in COMPILED for name in names):
        torch._dynamo.reset()  # else the cases before this one count against torch.compile's recompilation limit
    if gauges is not None:
        gauges.gpu.release_cache()  # else what those cases left is freed within a rival's figure
    bench = _CaseBench(case, show, gauges)
    with torch.inference_mode():
        for name in names:
            bench.start(name)
        bench.time(rounds)
        for row in bench.rows:
            bench.read(row)
            finish(row)
    return bench.rows, bench.all_remarks()


def interleaved(
    names: Iterable[str],
    rounds: int,
    seconds: Callable[[str, int], float],
    fail: Callable[[str, Exception], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Let rivals take turns; who begins a round moves on with each. Return each round's seconds of those that never failed.

    Args:
        names: of the rivals.
        rounds: in which each runs once.
        seconds: runs a rival in a round, and returns what it took.
        fail: is told of a rival that raised.
        tick: called after each round.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        order = list(times)
        first = i % max(1, len(order))
        for name in order[first:] + order[:first]:
            try:
                times[name].append(seconds(name, i))
            except Exception as error:  # one that cannot run must not take the others with it
                fail(name, error)
                del times[name]
        tick()
    return times


def describe_failure(title: str, rival: str, error: Exception) -> str:
    """Return one line on a rival that failed.

    Raises:
        DeviceLost: it takes all others with it.
    """
    if isinstance(error, torch.AcceleratorError):
        line = f"{title}: {rival} lost the GPU: {first_line(error)}; leave it out with --rivals to time the others"
        raise DeviceLost(line) from error
    if is_out_of_memory(error):
        return f"{title}: {rival} skipped, {OUT_OF_MEMORY}"
    return f"{title}: {rival} failed: {type(error).__name__}: {first_line(error)}"


class _CaseBench:
    """State of a case while it runs."""

    def __init__(self, case: Case, show: Callable[[str], None], gauges: Gauges | None):
        self.case, self.show, self.gauges = case, show, gauges
        self.gpu = None if gauges is None else gauges.gpu
        self.inputs = case.inputs()
        self.compared = torch.tensor(compared_samples(case.config, case.batch), device=case.device)
        self.bars: dict[str | Flavour, tuple[Tensor, float]] = {}
        self.rows: list[Row] = []
        self.remarks: list[str] = []
        self.started: dict[str, First] = {}
        self.calls: dict[str, Call] = {}
        self.seconds: dict[str, float] = {}  # a forward's, of the last round
        self.clocks: tuple[list[int], list[int]] = ([], [])  # in the first and in the last round
        if gauges is not None:
            gauges.slowed_by.clear()

    # -------------------------------------------------------------- parity
    def start(self, name: str) -> None:
        """Call a rival for the first time and compare its output."""
        if name.endswith(GRAPH) and kind_of(name) not in self.started:
            return  # the rival itself failed, as a remark says
        try:
            exact, allowed = self._bar(name)
            allowed = LOOSE_BAR if loose(name) else allowed
            self.show(f"{name}: first call and parity")
            first = self._first_call(name)
            row = new_row(self.case, name, _error(first.output[self.compared], exact), allowed)
        except Exception as error:  # a rival that cannot run must not take the others with it
            self._fail(name, error)
            return
        row.first_call_s = first.seconds
        row.peak_memory_gb = None if self.gpu is None else first.peak / 1e9
        self.rows.append(row)
        if row.parity:
            self.started[name] = first
        else:
            title = self.case.title
            self.remarks.append(f"{title}: {name} is off by {row.error:.1e}, {allowed:.1e} allowed; not timed")

    def _bar(self, name: str) -> tuple[Tensor, float]:
        """Return exact outputs and the error allowed: 1.1 times eager PyTorch's in the case's dtype, plus one unit roundoff."""
        case = self.case.arithmetic_of(name)
        flavour = case.config.flavour
        if flavour not in self.bars:
            self.show("float64 reference")
            x, t, y = (tensor[self.compared] for tensor in self.inputs)
            exact = case.reference(torch.float64)(x.double(), t, y)
            allowed = 1.1 * _error(case.reference()(x, t, y), exact) + UNIT_ROUNDOFF[case.dtype]
            self.bars[flavour] = exact, allowed
        return self.bars[flavour]

    def _first_call(self, name: str) -> First:
        gpu = self.gpu
        before = 0 if gpu is None else gpu.allocated_bytes()
        run = self.case.rival(name, {other: first.run for other, first in self.started.items()}, gpu)
        weights = 0 if gpu is None else gpu.allocated_bytes() - before
        if gpu is not None:
            gpu.wait()
            gpu.reset_peak()
        outputs: list[Tensor] = []
        _, seconds = timer.host_seconds(lambda: outputs.append(run(*self.inputs)), self.case.device)
        (output,) = outputs
        if gpu is None:
            return First(run, output, seconds, 0, 0)
        if name.endswith(GRAPH):  # whose capture is the one call that allocates
            captured = self.started[kind_of(name)]
            return First(run, output, seconds, captured.weights, gpu.peak_bytes() - before + captured.weights)
        gpu.reset_peak()
        run(*self.inputs)
        return First(run, output, seconds, weights, gpu.peak_bytes() - before)

    # -------------------------------------------------------------- time
    def time(self, rounds: int) -> None:
        """Fill the times of all rows whose parity holds."""
        rotation = itertools.cycle([self.inputs] if self.gauges is None else self.gauges.rotated(self.inputs))
        self.calls = {name: lambda run=first.run: run(*next(rotation)) for name, first in self.started.items()}  # type: ignore[misc]
        repeats: dict[str, int] = {}
        for name, call in list(self.calls.items()):
            try:
                self._seconds(call, 1)
                repeats[name] = max(1, math.ceil(SHORTEST_ROUND_S / self._seconds(call, 1)))
            except Exception as error:
                self._fail(name, error)

        def seconds(name: str, i: int) -> float:
            self.show(f"round {i + 1} of {rounds}")
            meanwhile = functools.partial(self._read_clock, {0: self.clocks[0], rounds - 1: self.clocks[1]}.get(i))
            return self._seconds(self.calls[name], repeats[name], meanwhile)

        times = interleaved(self.calls, rounds, seconds, self._fail)
        self.seconds = {name: own[-1] for name, own in times.items()}
        for row in self.rows:
            if row.rival in times:
                fill(row, times)

    def _seconds(self, call: Call, repeats: int, meanwhile: Call | None = None) -> float:
        """Return the seconds of one call."""
        return timer.seconds(call, self.case.device, repeats, meanwhile) / repeats

    def _read_clock(self, clocks: list[int] | None) -> None:
        if self.gauges is not None and clocks is not None:
            clock = self.gauges.clock_mhz()
            clocks += [] if clock is None else [clock]

    # -------------------------------------------------------------- what a GPU tells beside time
    def read(self, row: Row) -> None:
        """Fill what is neither time nor launches."""
        if self.gauges is None or self.gpu is None or row.rival not in self.seconds:
            return
        self.show(f"{row.rival}: host and energy")
        call = self.calls[row.rival]
        try:
            row.host_us = 1e6 * statistics.median(timer.host_seconds(call, self.gpu.device)[0] for _ in range(HOST_CALLS))
            busy = self.gauges.busy(call, self.seconds[row.rival])
        except Exception as error:
            self._fail(row.rival, error)
            return
        if busy is not None:
            row.joules_per_image, row.watts, row.clock_mhz = busy.joules / row.batch, busy.watts, busy.clock_mhz
        row.clock_mhz_before, row.clock_mhz_after = (statistics.median(c) if c else None for c in self.clocks)
        row.slowed_by = sorted(self.gauges.slowed_by)
        row.floor_ms, row.roofline_share = _roofline(row, self.case, self.gauges.data_sheet)
        row.floor_ms_measured, row.roofline_share_measured = _roofline(row, self.case, self.gauges.ceilings)

    def all_remarks(self) -> list[str]:
        """Return what failed, and what held the clocks down."""
        if self.gauges is None or not self.gauges.slowed_by:
            return self.remarks
        before, after = (f"{statistics.median(c):.0f} MHz" if c else "unknown" for c in self.clocks)
        slowed_by = ", ".join(sorted(self.gauges.slowed_by))
        return [*self.remarks, f"{self.case.title}: clocks held down by {slowed_by}; {before} before, {after} after"]

    def _fail(self, name: str, error: Exception) -> None:
        self.remarks.append(describe_failure(self.case.title, name, error))
        self.started.pop(name, None)
        self.calls.pop(name, None)
        if self.gpu is not None:
            self.gpu.release_cache()


def count_launches(case: Case, kinds: Sequence[str], gauges: Gauges) -> dict[str, int | None]:
    """Count the kernels of each rival's forward, with the profiler, which comes after everything else of a run."""
    found: dict[str, int | None] = {}
    inputs = case.inputs()
    with torch.inference_mode():
        for kind in kinds:
            run = case.rival(kind, {})
            run(*inputs)
            found[kind] = gauges.launches(lambda run=run: run(*inputs))  # type: ignore[misc]
    return found


def compared_samples(config: DiTConfig, batch: int) -> list[int]:
    """Return which samples of a batch are compared with float64."""
    small = batch * flops.flops(config) <= ORACLE_FLOPS
    return list(range(batch)) if small else sorted({i % batch for i in ORACLE_SAMPLES})


def _roofline(row: Row, case: Case, peaks: DeviceSpec | None) -> tuple[float | None, float | None]:
    """Return the least time that peaks allow, and how near to it a row comes."""
    if peaks is None or row.ms_median is None:
        return None, None
    bound = flops.floor_ms(case.config, case.batch, case.dtype, peaks)
    return bound, bound / row.ms_median


def _error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()
