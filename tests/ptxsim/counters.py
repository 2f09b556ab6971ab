"""What launches counted, per launch and summed per kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np

from .library import Program

# In the order of InsClass in cpp/program.h.
CLASSES = [
    *("mma", "ld.global", "st.global", "cp.async", "atom", "ld.shared", "st.shared", "ldmatrix", "shfl", "sfu", "fp32"),
    *("fp16", "fp64", "int", "cvt", "mov", "pred", "control", "barrier", "param", "local", "other"),
]


class Column(IntEnum):
    """Counters per instruction, in the order of Stat in cpp/program.h."""

    EXECUTED = 0
    LANES = 1
    BYTES = 2
    SECTORS = 3
    IDEAL_SECTORS = 4
    WAVEFRONTS = 5
    IDEAL_WAVEFRONTS = 6
    DIVERGENT = 7  # branches whose lanes part; stores to shared memory whose lanes disagree


@dataclass
class LaunchStats:
    """Counters of one launch, or the sum over launches of one kernel."""

    kernel: str = ""
    grid: tuple[int, ...] = ()
    num_warps: int = 0
    shared: int = 0
    n_regs: int = 0
    n_spills: int = 0
    launches: int = 1
    seconds: float = 0.0
    warp_instr: int = 0
    thread_instr: int = 0
    by_class: dict[str, int] = field(default_factory=dict)  # executed warp-instructions per class
    divergent_branches: int = 0
    global_load_bytes: int = 0  # requested (ld.global, cp.async, atom)
    global_store_bytes: int = 0
    sectors: int = 0  # 32-byte sectors touched, summed over warp-level accesses
    ideal_sectors: int = 0
    unique_sectors: int = 0  # distinct sectors in the launch: DRAM traffic lower bound / 32 B
    unique_sectors_read: int = 0
    unique_sectors_written: int = 0
    shared_wavefronts: int = 0
    shared_conflicts: int = 0  # extra wavefronts
    disagreeing_lane_stores: int = 0  # check_race only: lanes of one warp storing different values to one shared address
    mma_flops: int = 0
    fp32_flops: int = 0
    per_tensor: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (unique sectors read, written)
    _prog: Program | None = None
    _raw: np.ndarray | None = None

    @property
    def dram_bytes(self) -> int:
        """Compulsory traffic: every sector once."""
        return 32 * (self.unique_sectors_read + self.unique_sectors_written)

    @property
    def coalescing(self) -> float:
        """Sectors that the accesses need at least, over those they touch."""
        return self.ideal_sectors / self.sectors if self.sectors else 1.0

    def __iadd__(self, other: LaunchStats) -> LaunchStats:
        """Adds up what can be added; kernel, grid, sizes and registers stay those of the first launch."""
        for f in fields(self):
            if f.name in ("kernel", "grid", "num_warps", "shared", "n_regs", "n_spills", "_prog", "_raw"):
                continue
            mine, others = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, dict):
                for key, value in others.items():
                    mine[key] = _sum(mine[key], value) if key in mine else value
            else:
                setattr(self, f.name, mine + others)
        if self._prog is other._prog and self._raw is not None:
            self._raw = self._raw + other._raw
        return self

    def hot_lines(self, n: int = 15, by: str = "exec") -> list[dict[str, Any]]:
        """Executed warp-instructions, sectors and bank conflicts per source line; most ``by`` of these first."""
        program, raw = self._program_and_counters()
        lines: dict[tuple[str, int], np.ndarray] = {}
        for i in range(program.instructions):
            key = (program.filename(program.file[i]), int(program.source_line[i]))
            lines[key] = lines.get(key, 0) + raw[i]
        rows = [
            {
                "file": file,
                "line": line,
                "exec": int(c[Column.EXECUTED]),
                "sectors": int(c[Column.SECTORS]),
                "ideal_sectors": int(c[Column.IDEAL_SECTORS]),
                "conflicts": int(c[Column.WAVEFRONTS] - c[Column.IDEAL_WAVEFRONTS]),
                "wavefronts": int(c[Column.WAVEFRONTS]),
            }
            for (file, line), c in lines.items()
        ]
        return [row for row in sorted(rows, key=lambda row: -row[by])[:n] if row[by]]

    def hot_ptx(self, n: int = 15, by: str = "exec") -> list[tuple[int, str, int]]:
        """(line, text, count) of PTX lines, most first; ``by``: exec, sectors, excess_sectors or conflicts."""
        program, raw = self._program_and_counters()
        counts = {
            "exec": raw[:, Column.EXECUTED],
            "sectors": raw[:, Column.SECTORS],
            "excess_sectors": raw[:, Column.SECTORS] - raw[:, Column.IDEAL_SECTORS],
            "conflicts": raw[:, Column.WAVEFRONTS] - raw[:, Column.IDEAL_WAVEFRONTS],
        }[by]
        hottest = [i for i in np.argsort(-counts)[:n] if counts[i]]
        return [(int(program.line[i]), program.lines[program.line[i] - 1].strip(), int(counts[i])) for i in hottest]

    def summary(self) -> str:
        """The counters as text, five lines."""
        classes = {name: count for name, count in self.by_class.items() if count}
        unique = f"{self.unique_sectors_read:,} read + {self.unique_sectors_written:,} written = {self.dram_bytes:,} B"
        return "\n".join(
            [
                f"{self.kernel}: launches {self.launches}, grid {self.grid}, warps {self.num_warps}, "
                f"shared {self.shared} B, regs {self.n_regs}, spills {self.n_spills}",
                f"  warp-instr {self.warp_instr:,}  thread-instr {self.thread_instr:,}  "
                f"divergent branches {self.divergent_branches:,}",
                f"  classes {classes}",
                f"  global: load {self.global_load_bytes:,} B, store {self.global_store_bytes:,} B, "
                f"sectors {self.sectors:,} (ideal {self.ideal_sectors:,}), unique {unique}",
                f"  shared: wavefronts {self.shared_wavefronts:,}, extra by bank conflicts {self.shared_conflicts:,}",
                f"  flops: mma {self.mma_flops:,}, fp32 {self.fp32_flops:,}   simulated in {self.seconds:.3f} s",
            ]
        )

    def _program_and_counters(self) -> tuple[Program, np.ndarray]:
        assert self._prog is not None
        assert self._raw is not None
        return self._prog, self._raw.astype(np.int64)


def _sum(a: Any, b: Any) -> Any:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a + b


def count(program: Program, raw: np.ndarray, unique_sectors: np.ndarray, tensors: list[str], **launch: Any) -> LaunchStats:
    """Counters of a launch from those per instruction; ``unique_sectors``: read, written and either, per tensor."""
    c = raw.astype(np.int64)
    per_class = np.zeros((len(CLASSES), len(Column)), np.int64)
    np.add.at(per_class, program.cls, c)

    def total(column: Column, *classes: str) -> int:
        return int(per_class[[CLASSES.index(name) for name in classes or CLASSES], column].sum())

    def flops(cls: str, column: Column) -> int:
        return int((c[:, column] * program.flops)[program.cls == CLASSES.index(cls)].sum())

    loads, stores = ("ld.global", "cp.async", "atom"), ("st.global",)
    read, written, either = (int(x) for x in unique_sectors[: len(tensors)].sum(axis=0))
    return LaunchStats(
        **launch,
        warp_instr=total(Column.EXECUTED),
        thread_instr=total(Column.LANES),
        by_class={name: total(Column.EXECUTED, name) for name in CLASSES},
        divergent_branches=total(Column.DIVERGENT, "control"),
        global_load_bytes=total(Column.BYTES, *loads),
        global_store_bytes=total(Column.BYTES, *stores),
        sectors=total(Column.SECTORS, *loads, *stores),
        ideal_sectors=total(Column.IDEAL_SECTORS, *loads, *stores),
        unique_sectors=either,
        unique_sectors_read=read,
        unique_sectors_written=written,
        shared_wavefronts=total(Column.WAVEFRONTS),
        shared_conflicts=total(Column.WAVEFRONTS) - total(Column.IDEAL_WAVEFRONTS),
        disagreeing_lane_stores=total(Column.DIVERGENT, "st.shared"),
        mma_flops=flops("mma", Column.EXECUTED),
        fp32_flops=flops("fp32", Column.LANES),
        per_tensor={name: (int(row[0]), int(row[1])) for name, row in zip(tensors, unique_sectors, strict=False)},
        _prog=program,
        _raw=raw,
    )


class KernelStats(dict[str, LaunchStats]):
    """Kernel name -> summed LaunchStats; ``launches`` is the list of single launches in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[LaunchStats] = []

    def add(self, launch: LaunchStats) -> None:
        """Appends a launch, and adds it to its kernel's sum."""
        self.launches.append(launch)
        if launch.kernel in self:
            self[launch.kernel] += launch
        else:
            self[launch.kernel] = replace(launch, by_class=dict(launch.by_class), per_tensor=dict(launch.per_tensor))

    def total(self) -> LaunchStats:
        """The sum over all kernels."""
        total = LaunchStats(kernel="total", launches=0)
        for launch in self.launches:
            total += launch
        return total

    def summary(self) -> str:
        """The summaries of all kernels."""
        return "\n".join(stats.summary() for stats in self.values())


_recorders: list[KernelStats] = []


@contextlib.contextmanager
def record() -> Iterator[KernelStats]:
    """Collects the counters of the launches inside the ``with`` block."""
    stats = KernelStats()
    _recorders.append(stats)
    try:
        yield stats
    finally:
        _recorders[:] = [r for r in _recorders if r is not stats]


def report(launch: LaunchStats) -> None:
    """Gives a launch's counters to whoever records."""
    for recorder in _recorders:
        recorder.add(launch)
