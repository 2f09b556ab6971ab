"""Rounds of host.py: cases take turns, and each leaves a row."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import host_parts
from .host_cases import EAGER, FORWARD, LAYER_NORM, OP, OURS, STEP, Timed, makers, nothing
from .kernel_cases import OPS
from .rivals import Case
from .timing import describe_failure

FEWEST_ROUNDS = 2
WARMUP_CALLS = 3
PREPARING = 0.6  # of a budget
MOST_RATIO = {FORWARD: 0.8, STEP: 1.1, OP: 3.0}  # thresholds: times eager PyTorch's, or ATen's layer_norm
MOST_US = {OP: 30.0}


class Sample(NamedTuple):
    """Seconds of one call: until it returned, and of its thread's CPU."""

    wall: float
    cpu: float


@dataclass
class Row:
    """One kind of call of one model or op. A ratio is the median of the rounds', to ``baseline`` in the same round."""

    model: str
    batch: int
    depth: int
    dtype: str
    device: str
    kind: str
    name: str
    us: float  # median, as are all that follow without another word
    us_p20: float
    us_p80: float
    cpu_us: float  # of the calling thread; autograd's own thread, which CUDA's backward runs on, is not in it
    rounds: int
    baseline: str | None = None
    ratio: float | None = None
    ratio_low: float | None = None  # 95% interval of the ratio's median
    ratio_high: float | None = None
    cpu_ratio: float | None = None
    most_ratio: float | None = None  # thresholds
    most_us: float | None = None
    parts_us: dict[str, float] = field(default_factory=dict)  # where ditfast's time goes, in a run of its own


def sample(timed: Timed, wait: Callable[[], object]) -> Sample:
    """Time a warm call, from an idle device on."""
    with timed.mode():
        timed.call()  # so that the others have not left its code and data in no cache
        timed.before()
        wait()
        gc.disable()
        try:
            cpu, wall = time.thread_time(), time.perf_counter()
            for _ in range(timed.calls):
                timed.call()
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        finally:
            gc.enable()
    wait()
    return Sample(wall / timed.calls, cpu / timed.calls)


class CaseBench:
    """A model's cases while they run."""

    def __init__(self, case: Case, baselines: Sequence[str], seconds: float | None, show: Callable[[str], None]):
        self.case, self.baselines, self.show = case, baselines, show
        self.start, self.seconds = time.monotonic(), math.inf if seconds is None else seconds
        on_cuda = case.device.type == "cuda"
        self.wait: Callable[[], object] = torch.cuda.synchronize if on_cuda else nothing
        self.clock = time.perf_counter if on_cuda else time.thread_time
        self.timed: list[Timed] = []
        self.left_out: list[str] = []
        self.failures: list[str] = []

    def prepare(self) -> None:
        """Make what is to be timed and call it, which compiles."""
        if "compile" in self.baselines:
            torch._dynamo.reset()  # else the cases before this one count against torch.compile's recompilation limit
        for kind, name, make in makers(self.case, self.baselines):
            if self._spent() > PREPARING * self.seconds:
                self.left_out.append(f"{kind} {name}")
                continue
            self.show(f"{kind} {name}")
            try:
                timed = make()
                with timed.mode():
                    for _ in range(WARMUP_CALLS):
                        timed.before()
                        timed.call()
                self.wait()
            except Exception as error:  # one that cannot run must not take the others with it
                self.failures.append(describe_failure(self.case.title, f"{kind} {name}", error))
                continue
            self.timed.append(timed)

    def run(self, rounds: int) -> list[Row]:
        """Return a row of each, the parts of ditfast's models in theirs."""
        samples: list[list[Sample]] = [[] for _ in self.timed]
        order = list(range(len(self.timed)))
        shuffle = random.Random(0).shuffle
        for i in range(rounds):
            if i >= FEWEST_ROUNDS and self._spent() > self.seconds:
                break
            self.show(f"round {i + 1} of {rounds}")
            shuffle(order)
            for place in order:
                samples[place].append(sample(self.timed[place], self.wait))
        found = {(timed.kind, timed.name): own for timed, own in zip(self.timed, samples, strict=True)}
        rows = [self._row(kind, name, found) for kind, name in found]
        for timed, row in zip(self.timed, rows, strict=True):
            if timed.name == OURS:
                self.show(f"parts of a {timed.kind}")
                row.parts_us = self._parts(timed, row.rounds)
        return rows

    def _row(self, kind: str, name: str, found: Mapping[tuple[str, str], list[Sample]]) -> Row:
        case, own = self.case, found[kind, name]
        wall = [1e6 * one.wall for one in own]
        fifths = statistics.quantiles(wall, n=5, method="inclusive")
        cpu_us = 1e6 * statistics.median(one.cpu for one in own)
        about = (case.model, case.batch, case.config.depth, case.dtype_name, case.device.type)
        row = Row(*about, kind, name, statistics.median(wall), fifths[0], fifths[-1], cpu_us, len(own))
        baseline = EAGER if kind in (FORWARD, STEP) else LAYER_NORM
        others = found.get((kind, baseline))
        if name != baseline and others is not None:
            ratios = sorted(mine.wall / theirs.wall for mine, theirs in zip(own, others, strict=True))
            row.baseline, row.ratio = baseline, statistics.median(ratios)
            row.ratio_low, row.ratio_high = median_interval(ratios)
            row.cpu_ratio = statistics.median(mine.cpu / theirs.cpu for mine, theirs in zip(own, others, strict=True))
        if name == OURS or name in OPS:
            row.most_ratio, row.most_us = MOST_RATIO.get(kind), MOST_US.get(kind)
        return row

    def _parts(self, timed: Timed, rounds: int) -> dict[str, float]:
        def before() -> None:
            timed.before()
            self.wait()

        with timed.mode():
            return host_parts.parts_us(timed.call, before, rounds, self.clock)

    def _spent(self) -> float:
        return time.monotonic() - self.start


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest two order statistics with the median between them in 95% of cases; the outermost of a few values."""
    n, low = len(ordered), 0
    beyond = (1 + n) / 2**n  # chance that the median is below the second value
    while beyond <= 0.025:
        low += 1
        beyond += math.comb(n, low + 1) / 2**n
    return ordered[low], ordered[n - 1 - low]
