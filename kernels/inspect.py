"""The static proof of every kernel: compiles it ahead of time, reads its machine code and holds it to bars. Needs no GPU.

    python -m ditfast.kernels.inspect --arch sm_90

Instructions of straight-line code are what each warp executes, and of a row loop those of its body for every row. The issue
budget of a row kernel is what the device can issue while its memory moves the tensors once; of a matrix kernel, while its
tensor cores do one step of the main loop. Nothing here is a measurement of time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from rich.table import Table

from ditfast import interrupt
from ditfast.terminal import HelpFormatter, make_console, new_table, print_table, say, track_progress

from .ahead import TARGETS, Build, compiling_for, on_threads
from .hardware import ARCHITECTURES, SCHEDULERS, largest_shared_bytes, occupancy
from .inspect_cases import BARS, EXCEPTIONS, Bars, Case, cases, useful_multiply_adds
from .machine_code import Code, MachineCode, machine_code

PROGRAM = "python -m ditfast.kernels.inspect"
EXAMPLES = """examples:
  python -m ditfast.kernels.inspect                                  all kernels for all targets: some minutes
  python -m ditfast.kernels.inspect --arch sm_90                     one target
  python -m ditfast.kernels.inspect --arch sm_80 gfx942 --kernel joint_backward linear
  python -m ditfast.kernels.inspect --arch sm_90 --json > rows.json  stdout is JSON and nothing else

The exit status is 1 if a row misses a bar that is not a listed exception (docs/kernels.md has the bars).
"""


TILE_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "ROWS", "FIRST", "SECOND", "CHUNK", "CHUNKS", "BLOCK")


@dataclass(frozen=True)
class Row:
    """What the machine code of one kernel, at one tile, for one target says."""

    kernel: str
    case: str
    tile: str
    arch: str
    registers: int
    spills: int
    shared: int  # bytes
    occupancy: float  # resident warps over those a multiprocessor can hold
    instructions: float  # of all warps of a program together, for each ``per``
    per: str  # "row", "step" of the main loop, or "program" (then without repeats of its loops)
    outside: float  # where they are of a step: instructions of all warps of a program before and behind the loop
    mma: dict[str, int]  # matrix instructions by opcode, in the main loop
    loads: dict[int, int]  # global loads by bits a thread, in the whole program
    issue_share: float | None  # of the issue budget
    requested: float | None  # bytes that loads and stores ask for, over the size of all tensors
    work: float | None  # multiply-adds done over useful ones
    misses: list[str] = field(default_factory=list)
    exception: str | None = None  # why the misses are accepted

    @property
    def fails(self) -> bool:
        return bool(self.misses) and self.exception is None


@dataclass(frozen=True)
class Refused:
    """A call that its launcher refused, as when no tile fits the shared memory."""

    name: str
    arch: str
    reason: str


Found: TypeAlias = list[tuple[Case, Build | Refused]]


def collect(archs: Sequence[str], kernels: Sequence[str] = ()) -> Found:
    """Every distinct build of all cases, of the kernels named or of all; compiles nothing yet.

    Raises:
        ValueError: a target or a kernel that is not known; the message names those that are.
    """
    found: Found = []
    for arch in archs:
        with compiling_for(arch) as builds:
            for case in cases():
                before = len(builds)
                try:
                    case.call()
                except RuntimeError as error:
                    found.append((case, Refused(case.call.func.__name__, arch, str(error))))
                found += [(case, build) for build in builds[before:]]
    known = sorted({build.name for _, build in found})
    for name in kernels:
        if name not in known:
            raise ValueError(f"kernel: got {name!r}, expected one of {', '.join(known)}")
    return [(case, build) for case, build in found if not kernels or build.name in kernels]


def inspect(case: Case, build: Build | Refused) -> Row:
    """Compiles one build, reads its machine code and holds it to its bars."""
    if isinstance(build, Refused):
        nothing: dict[Any, int] = {}
        counts = (0, 0, 0, 0.0, 0.0, "program", 0.0, nothing, nothing, None, None, None)
        return Row(build.name, case.label, "", build.arch, *counts, misses=[build.reason])
    code = machine_code(build.compiled)
    metadata = build.compiled.metadata
    loop, rows = code.main_loop, build.constants.get("ROWS", 1)
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    executed = _executed(build, code)
    instructions, per, outside = executed.instructions * metadata.num_warps, "program", 0.0
    if loop is not None and loop.mma:
        instructions, per = len(loop) * metadata.num_warps, "step"
        outside = (len(code) - len(loop)) * metadata.num_warps
    elif _takes_whole_rows(build):
        instructions, per = instructions / rows, "row"
    row = Row(
        kernel=build.name,
        case=case.label,
        tile=_tile(build),
        arch=build.arch,
        registers=code.registers,
        spills=code.spills,
        shared=metadata.shared,
        occupancy=occupancy(build.arch, code.registers, metadata.shared, metadata.num_warps, tensor_memory),
        instructions=instructions,
        per=per,
        outside=outside,
        mma=dict((loop if loop is not None and loop.mma else code).mma),
        loads=dict(sorted(code.loads.items(), reverse=True)),
        issue_share=_issue_share(build, code, executed),
        requested=executed.bytes_moved * metadata.num_warps * metadata.warp_size * build.grid / build.tensor_bytes
        if executed.exact
        else None,
        work=_work(build, loop),
    )
    missed = list(_misses(row, build, BARS.get(build.name, Bars())))
    known = [_known(row, bar, value) for bar, value, _ in missed]
    row.misses.extend(message for _, _, message in missed)
    if missed and all(known):
        return replace(row, exception="; ".join(dict.fromkeys(reason for reason in known if reason)))
    return row


class Executed(NamedTuple):
    """What one thread of a program executes; exact unless the program loops in a way that its constants do not tell."""

    instructions: float
    bytes_moved: float
    exact: bool


def _executed(build: Build, code: MachineCode) -> Executed:
    loop = code.main_loop
    if loop is None:
        return Executed(len(code), code.bytes_moved, exact=True)
    if not _takes_whole_rows(build) or loop.mma:
        return Executed(len(code), code.bytes_moved, exact=False)
    rows = build.constants["ROWS"]
    threads = build.compiled.metadata.num_warps * build.compiled.metadata.warp_size
    rows_a_turn = max(1, round(loop.bytes_moved * threads / (build.tensor_bytes / build.grid / rows)))  # the compiler unrolls
    turns = rows / rows_a_turn - 1
    return Executed(len(code) + turns * len(loop), code.bytes_moved + turns * loop.bytes_moved, exact=True)


def _takes_whole_rows(build: Build) -> bool:
    return "D" in build.constants and "ROWS" in build.constants


def _issue_share(build: Build, code: MachineCode, executed: Executed) -> float | None:
    limits = ARCHITECTURES.get(build.arch)
    loop, num_warps = code.main_loop, build.compiled.metadata.num_warps
    if limits is None:
        return None
    if loop is not None and loop.mma:
        products = loop.multiply_adds
        return len(loop) / SCHEDULERS / (products / limits.multiply_adds) if products else None
    if not executed.exact or code.mma:
        return None
    return executed.instructions * num_warps * build.grid / (build.tensor_bytes * limits.instructions_a_byte)


def _work(build: Build, loop: Code | None) -> float | None:
    """Of 16-bit products; those in fp32 are not what tensor cores are for."""
    useful = useful_multiply_adds(build.name, build.constants) if multiplies_16_bit_matrices(build) else None
    done = loop.multiply_adds if loop is not None and loop.mma else None
    return done * build.compiled.metadata.num_warps / useful if done and useful else None


def _misses(row: Row, build: Build, bars: Bars) -> Iterator[tuple[str, float, str]]:
    """The bars that a row misses: which, by what value, and in words."""
    if row.spills:
        yield "spills", row.spills, f"{row.spills} spills"
    if row.shared > largest_shared_bytes(row.arch):
        yield "shared", row.shared, f"{row.shared} bytes of shared memory of {largest_shared_bytes(row.arch)}"
    if multiplies_16_bit_matrices(build) and not row.mma:
        yield "mma", 0, "no tensor-core instruction"
    narrow = [f"{bits}" for bits in row.loads if bits < 128]
    if bars.wide_loads and narrow:
        yield "loads", 0, f"loads of {', '.join(narrow)} bits"
    share, most = row.issue_share or 0.0, bars.issue_share or math.inf
    if row.arch == "sm_90" and build.constants.get("D") == 1152 and share > most:
        yield "issue", share, f"{share:.0%} of the issue budget, over {most:.0%}"
    if row.work is not None and bars.work and build.constants.get("HEAD") == 72 and row.work > bars.work:
        yield "work", row.work, f"{row.work:.2f}x the useful multiply-adds, over {bars.work}x"


def multiplies_16_bit_matrices(build: Build) -> bool:
    return re.search(r"tt\.dot .*: tensor<\w+x(bf16|f16)", build.compiled.asm["ttir"]) is not None


def _known(row: Row, bar: str, value: float) -> str | None:
    for known in EXCEPTIONS:
        if (known.kernel, known.bar) == (row.kernel, bar) and row.arch in known.archs and known.tile in ("", row.tile):
            return known.reason if value <= known.worst else None
    return None


def _tile(build: Build) -> str:
    constants, options = build.constants, build.options
    sizes = [name for name in TILE_CONSTANTS if name in constants]
    shape = "x".join(str(constants[name]) for name in sizes)
    stages = f" {options['num_stages']}s" if any(name.startswith("BLOCK_") for name in sizes) else ""
    return f"{shape} {options['num_warps']}w{stages}".strip()


def inspect_all(found: Found, jobs: int) -> Iterator[Row]:
    """Rows in order, compiled on ``jobs`` threads: most of the time goes by outside of Python."""
    return on_threads(lambda pair: inspect(*pair), found, jobs)


def table(rows: Iterable[Row]) -> Table:
    columns = (
        "kernel",
        "case",
        "tile",
        "reg",
        "spills",
        "shared",
        "occ.",
        "warp inst.",
        "MMA",
        "loads",
        "issue",
        "asked",
        "work",
        "",
    )
    shown = new_table(*columns)
    for row in rows:
        shown.add_row(
            row.kernel,
            row.case,
            row.tile,
            str(row.registers),
            str(row.spills),
            f"{row.shared / 1024:.0f}K",
            f"{row.occupancy:.0%}",
            f"{row.instructions:.0f}/{row.per}",
            " ".join(f"{number} {opcode}" for opcode, number in row.mma.items()),
            " ".join(f"{number}x{bits}" for bits, number in row.loads.items()),
            "" if row.issue_share is None else f"{row.issue_share:.0%}",
            "" if row.requested is None else f"{row.requested:.2f}x",
            "" if row.work is None else f"{row.work:.2f}x",
            "MISS: " + "; ".join(row.misses) if row.fails else f"known: {'; '.join(row.misses)}" if row.exception else "ok",
            style="red" if row.fails else "yellow" if row.exception else None,
        )
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compiles every kernel ahead of time and holds its machine code to bars. Needs no GPU.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--arch", nargs="+", default=list(TARGETS), metavar="ARCH", help=f"of {', '.join(TARGETS)}; default: all"
    )
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="default: all; a wrong one lists the names")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, instead of tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads that compile; default %(default)s")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"jobs: got {args.jobs}, expected at least 1")
    try:
        found = collect(args.arch, args.kernel)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    rows = []
    try:
        with track_progress("compiling", len(found), "kernels") as progress:
            for row in inspect_all(found, args.jobs):
                rows.append(row)
                progress.advance()
    except OSError as error:  # of Triton's cache
        parser.exit(1, f"{parser.prog}: {error}\n")
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        report(rows, args.arch)
    return int(any(row.fails for row in rows))


def report(rows: Sequence[Row], archs: Sequence[str]) -> None:
    console = make_console()
    for arch in archs:
        title = f"{arch} ({ARCHITECTURES[arch].gpu})" if arch in ARCHITECTURES else arch
        print_table(table(row for row in rows if row.arch == arch), console, title)
        console.print()
    for reason in dict.fromkeys(row.exception for row in rows if row.exception):
        say(f"known: {reason}", console, "yellow")
    failing = sum(row.fails for row in rows)
    known = sum(row.exception is not None for row in rows)
    say(f"{len(rows)} rows: {failing} miss a bar, {known} known exceptions", console)


if __name__ == "__main__":
    sys.exit(interrupt.run(PROGRAM, main))
