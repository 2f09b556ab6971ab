"""What benchmarks/gpu_report.py runs: commands, their shares of the time, and what each leaves to be read."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from ditfast.benchmarks import predicted_tables
from ditfast.benchmarks.report import print_tables
from ditfast.benchmarks.rows import Row

ROOT = Path(__file__).resolve().parents[1]
BENCHES = Path(__file__).resolve().parent
FAILURES_SHOWN = 20
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError)  # whatever a file holds
BENCH_JSON, TRAINING_JSON, SAMPLING_JSON = "bench.json", "training.json", "sampling.json"
KERNELS_JSON, TESTS_XML = "kernels.json", "tests.xml"


@dataclass
class Reading:
    """What a step left: Markdown, the same for machines, remarks."""

    blocks: list[str] = field(default_factory=list)
    data: Any = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A process of its own.

    Args:
        name: for --steps, and of its folder.
        title: of its section.
        share: seconds of nine minutes; guesses, none was measured.
        words: its command behind ``python``. ``{out}`` is its folder, ``{budget}`` the seconds it may plan with.
        rehearsal: the same on a CPU, as small as can be; None if it needs a GPU.
        read: its folder and what it printed; may raise one of ``UNREADABLE``.
        modules: that have to be there.
    """

    name: str
    title: str
    share: float
    words: Sequence[str]
    rehearsal: Sequence[str] | None
    read: Callable[[Path, str], Reading]
    modules: Sequence[str] = ()

    def command(self, folder: Path, seconds: float, *, rehearse: bool) -> list[str] | None:
        words = self.rehearsal if rehearse else self.words
        budget = max(1, int(0.7 * seconds))  # the rest is for imports and for what is under way when it ends
        return None if words is None else [sys.executable, *(word.format(out=folder, budget=budget) for word in words)]


def printed(folder: Path, output: str) -> Reading:
    return Reading([code(output)] if output.strip() else [])


def read_tests(folder: Path, output: str) -> Reading:
    suite = ElementTree.parse(folder / TESTS_XML).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{TESTS_XML}: got no testsuite, expected one")
    ran, failed, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    selected = re.search(r"(\d+) selected", output) or re.search(r"collected (\d+) item", output)
    left_out = max(0, int(selected[1]) - ran) if selected else None
    broken = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": (found.get("message") or "").split("\n")[0]}
        for case in suite.iter("testcase")
        for found in (*case.findall("failure"), *case.findall("error"))
    ]
    passed = ran - failed - errors - skipped
    counts = {"passed": passed, "failed": failed, "errors": errors, "skipped": skipped, "left_out": left_out}
    blocks = [", ".join(f"{'?' if value is None else value} {name.replace('_', ' ')}" for name, value in counts.items())]
    blocks += ["\n".join(f"- `{one['test']}`: {one['message']}" for one in broken[:FAILURES_SHOWN])] * bool(broken)
    notes = [f"{left_out} tests were left out: the time was up"] * bool(left_out)
    notes += [f"{len(broken)} tests failed; {TESTS_XML} has all of them"] * bool(broken)
    return Reading(blocks, {**counts, "broken": broken}, notes)


def read_tune(folder: Path, output: str) -> Reading:
    """The table, and the record that its last line names."""
    reading = printed(folder, output)
    named = re.search(r"problems are in (.+\.json)$", output, re.MULTILINE)
    if named is not None:
        reading.data = _json(Path(named[1]))
    return reading


def read_bench(folder: Path, output: str) -> Reading:
    report = _json(folder / BENCH_JSON)
    rows = [Row(**row) for row in report["rows"]]
    blocks = [_text(lambda console: print_tables(console, rows))] if rows else []
    reading = Reading([*blocks, *_plots(folder)], report, list(report["notes"]))
    try:
        reading.blocks += predicted_tables.beside_measured(folder / BENCH_JSON)
    except UNREADABLE as error:
        reading.notes.append(f"nothing predicted to set beside it: {error}")
    return reading


def read_kernels(folder: Path, output: str) -> Reading:
    from ditfast.benchmarks.kernels import Found, summary_tables  # needs pytest

    if not (folder / KERNELS_JSON).is_file():
        return Reading(notes=["nothing was timed"])
    infos = [one["extra_info"] for one in _json(folder / KERNELS_JSON)["benchmarks"]]
    found = [Found(**{name: info[name] for name in Found.__dataclass_fields__}) for info in infos if info]
    tables = summary_tables(found)
    return Reading([_text(lambda console: console.print(*tables))] if tables else [], [asdict(one) for one in found])


def read_json_of(name: str) -> Callable[[Path, str], Reading]:
    """Of a bench that prints its table."""

    def read(folder: Path, output: str) -> Reading:
        report = _json(folder / name)
        return Reading([*printed(folder, output).blocks, *_plots(folder)], report, list(report["notes"]))

    return read


def code(text: str) -> str:
    return "```text\n" + text.rstrip().replace("```", "'''") + "\n```"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: no JSON: {error}") from error


def _plots(folder: Path) -> list[str]:
    return [f"![{path.stem}]({folder.name}/{path.name})" for path in sorted(folder.glob("*.png"))]


def _text(show: Callable[[Console], None]) -> str:
    console = Console(width=112, record=True, file=io.StringIO())
    show(console)
    return code(console.export_text())


BENCH = ("-m", "ditfast.benchmarks.bench", "--out", "{out}", "--models")
TESTS = ("-m", "pytest", "-m", "gpu", "--junit-xml", f"{{out}}/{TESTS_XML}")
KERNELS = ("-m", "pytest", str(BENCHES / "kernels.py"), "--benchmark-json", f"{{out}}/{KERNELS_JSON}", "-k")
TRAINING = ("-m", "ditfast.benchmarks.training", "--out", "{out}", "--rivals", "eager:bf16", "ditfast:bf16", "--models")
SAMPLING = ("-m", "ditfast.benchmarks.sampling", "--out", "{out}", "--rivals", "ditfast", "ditfast-bf16")
DOCTOR = ("-m", "ditfast", "doctor")
TUNE = ("-m", "ditfast", "tune", "--batch", "8", "32", "--budget", "{budget}")
ON_A_CPU = ("--batch", "1", "--rivals", "eager", "ditfast", "--rounds", "5")
PLOTS = ("matplotlib", "sklearn")

STEPS = (
    Step("doctor", "What is here, and what each op takes", 35, DOCTOR, DOCTOR, printed),
    Step(
        "tests",
        "Tests that need a GPU",
        120,
        (*TESTS, str(ROOT / "tests")),
        (*TESTS, str(ROOT / "tests/gpu/test_streams.py")),
        read_tests,
        ("pytest",),
    ),
    Step("tune", "The fastest implementations", 80, TUNE, None, read_tune),
    Step(
        "bench",
        "Forwards against eager PyTorch",
        100,
        (*BENCH, "DiT-XL/2", "--batch", "8", "32", "1", "--rivals", "eager", "ditfast"),
        (*BENCH, "DiT-S/8", *ON_A_CPU),
        read_bench,
        PLOTS,
    ),
    Step(
        "compile",
        "A forward against torch.compile",
        75,
        (*BENCH, "DiT-XL/2", "--batch", "32", "--rivals", "eager", "compile", "ditfast"),
        None,
        read_bench,
        PLOTS,
    ),
    Step(
        "kernels",
        "Each op against eager PyTorch and torch.compile",
        55,
        (*KERNELS, "XL and b32 and not backward"),
        (*KERNELS, "XL and b32 and unpatchify and not backward"),
        read_kernels,
        ("pytest", "pytest_benchmark"),
    ),
    Step(
        "training",
        "Steps of training",
        50,
        (*TRAINING, "DiT-XL/2", "--batch", "32", "--rounds", "3"),
        (*TRAINING, "DiT-S/8", "--depth", "1", "--batch", "1", "--rounds", "2"),
        read_json_of(TRAINING_JSON),
    ),
    Step(
        "sampling",
        "Whole sampling runs",
        25,
        (*SAMPLING, "--steps", "20", "--rounds", "2"),
        (*SAMPLING, "--width", "S", "--depth", "1", "--steps", "3", "--rounds", "1"),
        read_json_of(SAMPLING_JSON),
        ("matplotlib",),
    ),
)
