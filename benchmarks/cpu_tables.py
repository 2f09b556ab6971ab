"""The CPU's times in Markdown, made of a JSON that ``benchmarks/bench.py`` wrote; nothing is run.

    python benchmarks/cpu_tables.py docs/cpu-bench.json                               the README's table and the guide's
    python benchmarks/cpu_tables.py docs/cpu-bench.json --into README.md docs/cpu.md  between the lines that mark their places

The place of a table is what stands between ``<!-- cpu-summary -->`` and ``<!-- /cpu-summary -->``, or the same with cpu-times.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ditfast import interrupt
from ditfast.benchmarks import results
from ditfast.benchmarks.report import OWN, cases, number
from ditfast.benchmarks.results import Results
from ditfast.benchmarks.rivals import COMPILED, IN_DIFFUSERS, IN_OPENVINO, OURS
from ditfast.benchmarks.rows import Row
from ditfast.files import whole_file
from ditfast.terminal import HelpFormatter

LABELS = {
    "compile": "torch.compile",
    "max-autotune": "torch.compile's max-autotune",
    "openvino": "OpenVINO",
    "openvino-int8": "OpenVINO int8",
    "ditfast+table": "ditfast with table",
    "ditfast-int8": "ditfast int8",
    "ditfast-int8+table": "ditfast int8 with table",
}
MADE_BY = {  # packages in a report's environment, and who runs on them
    "torch": ("eager", *COMPILED),
    "diffusers": IN_DIFFUSERS,
    "openvino": tuple(IN_OPENVINO),
    "nncf": ("openvino-int8",),
    "ditfast": tuple(OURS),
}
IN_ITS_DTYPE = {
    "eager": "eager",
    "torch.compile": "compile",
    "diffusers": "diffusers",
    "OpenVINO": "openvino",
    "ditfast": "ditfast",
    "with table": "ditfast+table",
}
IN_INT8 = {"OpenVINO": "openvino-int8", "ditfast": "ditfast-int8", "with table": "ditfast-int8+table"}
LINES = {"{}": IN_ITS_DTYPE, "int8, rest {}": IN_INT8}  # of a case in the summary: what runs in each column
ONES_OWN = ("ditfast", "with table")
FACTS = {"cpu features": "{}", "threads": "threads: {}", "cpu engine": "CPU engine {}"}
OVER = ("compile", "openvino", "openvino-int8")
ERRORS = ("OpenVINO", "ditfast")
FIRST_CALLS = ("torch.compile", "OpenVINO", "ditfast")
SUMMARY = """\
Median ms of a forward of the batch; how many times as fast ditfast is as others (median of the rounds' ratios), without the
table and with it, which is the modulation computed beforehand, as in sampling; relative errors against the float64 reference;
seconds of the first call, which compiles, converts or packs. In a line of int8 OpenVINO's ms and error are of its int8 too."""
TIMES = """\
ms: median of a forward of the batch. Error: relative, against the float64 reference; nothing is timed where it is more than
allowed. First call: compiles, converts or packs. Over: median of the rounds' ratios. Table: modulation computed beforehand."""


def read(path: Path) -> Results:
    """Read the results of bench.py.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no rows of this version.
    """
    bench = results.read(path)
    bench.rows = list(results.rows_as(Row, bench, path))
    return bench


def summary(bench: Results) -> Iterator[str]:
    """For the README: a line for each case and dtype."""
    yield _provenance(bench)
    yield SUMMARY
    ms = [f"{column}, ms" for column in IN_ITS_DTYPE]
    over = [f"over {_label(rival)}" for rival in OVER]
    errors, first_calls = f"error: {', '.join(ERRORS)}", f"first call, s: {', '.join(FIRST_CALLS)}"
    columns = ("model, batch", "dtype", *ms, *over, errors, first_calls)
    yield _table(columns, [line for rows in cases(bench.rows) for line in _lines(rows)])


def times(bench: Results) -> Iterator[str]:
    """For the guide: a line for each rival on each case, then what the run had to say."""
    yield _provenance(bench)
    yield TIMES
    others = [rival for rival in dict.fromkeys(one.rival for one in bench.rows) if rival not in OWN]
    columns = ("model", "batch", "dtype", "rival", "ms", "p20 to p80", "error", "first call, s")
    lines = []
    for one in bench.rows:
        spread = "" if one.ms_median is None else f"{number(one.ms_p20)} to {number(one.ms_p80)}"
        case, own = (one.model, str(one.batch), one.dtype), (_ms(one), spread, _error(one), number(one.first_call_s))
        lines.append([*case, _label(one.rival), *own, *(_ratio(one, rival) if one.rival in OWN else "" for rival in others)])
    yield _table((*columns, *(f"over {_label(rival)}" for rival in others)), lines)
    if bench.notes:
        yield "\n".join(f"- {note}" for note in bench.notes)


PARTS = {"cpu-summary": summary, "cpu-times": times}


def filled(text: str, bench: Results) -> str:
    """A guide with its tables made of ``bench``.

    Raises:
        ValueError: there is no place for one.
    """
    places = 0
    for name, part in PARTS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        block = "\n\n".join([begin, *part(bench), end])
        pieces = re.split(f"{begin}.*?{end}", text, flags=re.DOTALL)
        text = block.join(pieces)
        places += len(pieces) - 1
    if not places:
        raise ValueError(f"got no <!-- {' --> or <!-- '.join(PARTS)} --> with its end, expected a place for a table")
    return text


def _provenance(bench: Results) -> str:
    rivals = {one.rival for one in bench.rows}
    packages = []
    for package, made in MADE_BY.items():
        here = [_label(rival) for rival in made if rival in rivals]
        if here:
            packages.append(f"{package} {bench.versions.get(package) or 'of unknown version'} ({', '.join(here)})")
    facts = [text.format(bench.machine[name]) for name, text in FACTS.items() if bench.machine.get(name)]
    facts += [bench.date, *([f"git {bench.commit}"] if bench.commit else [])]
    lines = [f"{', '.join([bench.machine['device'], *facts])}.", f"{'; '.join(packages)}."]
    if bench.command:
        lines.append(f"`{bench.command}`")
    return "\n".join(lines)


def _lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield the lines of one case."""
    first, by_rival = rows[0], {one.rival: one for one in rows}
    for kind, rivals in LINES.items():
        found = {column: by_rival.get(rival) for column, rival in rivals.items()}
        if not any(found.values()):
            continue
        ms = [_ms(found.get(column)) for column in IN_ITS_DTYPE]
        over = [_joined([_ratio(found.get(own), rival) for own in ONES_OWN]) for rival in OVER]
        errors = _joined([_error(found.get(column)) for column in ERRORS])
        first_calls = _joined([_first_call(found.get(column)) for column in FIRST_CALLS])
        yield [f"{first.model}, {first.batch}", kind.format(first.dtype), *ms, *over, errors, first_calls]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Without the columns that hold nothing."""
    kept = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    head, *body = (f"| {' | '.join(line[i] for i in kept)} |" for line in (columns, *lines))
    return "\n".join([head, "|---" * len(kept) + "|", *body])


def _joined(cells: Sequence[str]) -> str:
    return ", ".join(cell or "-" for cell in cells) if any(cells) else ""


def _ms(one: Row | None) -> str:
    return "" if one is None else "not timed" if one.ms_median is None else number(one.ms_median)


def _ratio(one: Row | None, rival: str) -> str:
    return "" if one is None or rival not in one.speedup_over else f"{one.speedup_over[rival]:.2f}"


def _error(one: Row | None) -> str:
    return "" if one is None else f"{one.error:.1e}"


def _first_call(one: Row | None) -> str:
    return "" if one is None else number(one.first_call_s)


def _label(rival: str) -> str:
    return LABELS.get(rival, rival)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/cpu_tables.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("bench", type=Path, metavar="JSON", help="of a run on a CPU")
    parser.add_argument(
        "--into", nargs="+", type=Path, default=[], metavar="PATH", help="guides to write to, instead of stdout"
    )
    args = parser.parse_args(argv)
    try:
        bench = read(args.bench)
        if not args.into:
            print("\n\n".join(block for part in PARTS.values() for block in part(bench)))
        for path in args.into:
            try:
                text = filled(path.read_text("utf-8"), bench)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            with whole_file(path) as temporary:
                temporary.write_text(text, "utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(interrupt.run("benchmarks/cpu_tables.py", main))
