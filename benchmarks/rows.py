"""Rows of bench.json: one rival on one case."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from ditfast import flops

from .rivals import Case


@dataclass
class Row:
    """One rival on one case. Times are of one forward of the whole batch; they are None where parity is red or timing failed.

    What follows ``first_call_s`` is read on a GPU only, and None where it could not be.
    """

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
    first_call_s: float | None = None  # compiles, tunes or captures
    host_us: float | None = None  # from an idle device on, until the call returns; median
    launches: int | None = None  # kernels of a forward, at the model's first batch; for a graph, of what it captured
    peak_memory_gb: float | None = None  # weights, activations and workspaces of this rival alone
    joules_per_image: float | None = None
    watts: float | None = None
    clock_mhz: float | None = None  # of the multiprocessors, in the second that energy was counted over
    clock_mhz_before: float | None = None  # the case's rounds
    clock_mhz_after: float | None = None
    slowed_by: list[str] = field(default_factory=list)  # what held the clocks down in this case
    floor_ms: float | None = None  # roofline bound, ditfast.flops.floor_ms at the data sheet's peaks
    floor_ms_measured: float | None = None  # and at what this GPU's copies and large products reach
    roofline_share: float | None = None  # the floor over the median
    roofline_share_measured: float | None = None


def new_row(case: Case, rival: str, error: float, allowed: float) -> Row:
    return Row(
        model=case.model,
        rival=rival,
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
    """Fill a row's speed from the seconds a forward of every rival in every round."""
    row.tflops_per_s = row.gflops * row.batch / fill_speed(row, times) / 1e3


def fill_speed(row: Any, times: dict[str, list[float]]) -> float:
    """Fill times, images a second and speedups of a bench's row, and return the median seconds."""
    own = times[row.rival]
    fifths = statistics.quantiles(own, n=5, method="inclusive")
    median = statistics.median(own)
    row.ms_median, row.ms_p20, row.ms_p80 = 1e3 * median, 1e3 * fifths[0], 1e3 * fifths[3]
    row.images_per_s = row.batch / median
    row.speedup_over = {
        rival: statistics.median(theirs / mine for theirs, mine in zip(others, own, strict=True))
        for rival, others in times.items()
        if rival != row.rival
    }
    return median
