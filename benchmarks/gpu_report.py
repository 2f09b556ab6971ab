"""All that a first hour on a GPU asks, in one command: tests, tuning, benches, and a report of them.

    python benchmarks/gpu_report.py --out report                       nine minutes on a GPU
    python benchmarks/gpu_report.py --out report --steps tests bench   some of it, in the same time
    python benchmarks/gpu_report.py --out report --minutes 30
    python benchmarks/gpu_report.py --out report --rehearse            without a GPU: every step as small as can be, or skipped

Writes report.md, report.json (all that is for machines) and a folder a step (what it printed, its own JSON, its plots). Each
step is a process with a share of the time; what it leaves over goes to the later ones. A step that fails, lacks a tool or is
cut off costs its section. Both files are written anew after each step, so that a run that is ended has the steps before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ditfast.benchmarks import cut_off
from ditfast.benchmarks.environment import describe
from ditfast.benchmarks.gpu_report_steps import STEPS, UNREADABLE, Reading, Step, code
from ditfast.benchmarks.markdown import head, row
from ditfast.benchmarks.timing import progress_bar
from ditfast.files import whole_file

MINUTES = 9.0
LINES_OF_A_FAILURE = 15
REHEARSAL = "**A rehearsal on a CPU, as small as can be: no number below says how fast a GPU is.**"


@dataclass
class Section:
    """A step that ended, however."""

    title: str
    result: str
    seconds: float = 0.0
    command: str = ""
    reading: Reading = field(default_factory=Reading)


@dataclass
class Report:
    """In ``folder``: report.md and report.json."""

    folder: Path
    environment: dict[str, Any]
    minutes: float
    rehearsal: bool
    sections: dict[str, Section] = field(default_factory=dict)
    interrupted: bool = False

    def save(self) -> None:
        """Both files, whole.

        Raises:
            OSError: they cannot be written.
        """
        for name, text in (("report.md", self.markdown()), ("report.json", json.dumps(self.for_machines(), indent=2) + "\n")):
            with whole_file(self.folder / name) as temporary:
                temporary.write_text(text, "utf-8")

    def markdown(self) -> str:
        blocks = ["# ditfast on " + str(self.environment["device"]), *[REHEARSAL] * self.rehearsal]
        blocks += ["**Interrupted: steps are missing.**"] * self.interrupted
        known = {name: value for name, value in self.environment.items() if value is not None}
        blocks.append("\n".join([*head("environment", ""), *(row(name, str(value)) for name, value in known.items())]))
        lines = [row(one.title, one.result, f"{one.seconds:.0f}") for one in self.sections.values()]
        blocks.append("\n".join([*head("step", "result", "seconds"), *lines]))
        for one in self.sections.values():
            blocks += [f"## {one.title}", *[f"`{one.command}`"] * bool(one.command), f"Result: {one.result}."]
            blocks += ["\n".join(f"- {note}" for note in one.reading.notes)] * bool(one.reading.notes)
            blocks += one.reading.blocks
        return "\n\n".join(blocks) + "\n"

    def for_machines(self) -> dict[str, Any]:
        steps = {
            name: {
                "result": one.result,
                "seconds": one.seconds,
                "command": one.command,
                "notes": one.reading.notes,
                "data": one.reading.data,
            }
            for name, one in self.sections.items()
        }
        about = {"minutes": self.minutes, "rehearsal": self.rehearsal, "interrupted": self.interrupted}
        return {"environment": self.environment, **about, "steps": steps}


def take(step: Step, folder: Path, seconds: float, args: argparse.Namespace, show: Callable[[], None]) -> Section:
    """A section, whatever becomes of the step, in ``folder``, which is made."""
    missing = [module for module in step.modules if importlib.util.find_spec(module) is None]
    if missing:
        return Section(step.title, f"skipped: {' and '.join(missing)} not installed (pip install -e '.[bench,test]')")
    command = step.command(folder, seconds, rehearse=args.rehearse)
    if command is None:
        return Section(step.title, "skipped: needs a GPU")
    if seconds < 1:
        return Section(step.title, "skipped: the time was up")
    folder.mkdir()
    start = time.monotonic()
    status = cut_off.run(command, folder, seconds, _environment(args.device), show)
    taken = time.monotonic() - start
    result = "cut off: its time was up" if status is None else f"failed: status {status}" if status else "done"
    return Section(step.title, result, taken, shlex.join(["python", *command[1:]]), _read(step, folder, status))


def _read(step: Step, folder: Path, status: int | None) -> Reading:
    printed, complaints = ((folder / name).read_text("utf-8", "replace") for name in ("stdout.txt", "stderr.txt"))
    try:
        reading = step.read(folder, printed)
    except UNREADABLE as error:
        reading = Reading(notes=[f"it left nothing that can be read: {type(error).__name__}: {error}"])
    if status != 0:
        lines = [line for line in (complaints.strip() or printed).splitlines() if line.strip()]
        reading.blocks += [code("\n".join(lines[-LINES_OF_A_FAILURE:]))] * bool(lines)
    return reading


def _environment(device: torch.device) -> dict[str, str]:
    """In which there is this device alone."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = device.index or 0
    chosen = "" if device.type == "cpu" else visible[index] if index < len(visible) else str(index)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": chosen, "PYTHONUNBUFFERED": "1"}


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    args, parser = parse_arguments(argv, steps)
    chosen = [step for step in steps if step.name in (args.steps or {step.name for step in steps})]
    report = Report(args.out.resolve(), describe(args.device), args.minutes, args.rehearse)
    console = Console(stderr=True)
    try:
        report.folder.mkdir(parents=True, exist_ok=True)
        if any(report.folder.iterdir()):
            parser.error(f"argument --out: got {args.out}, expected a new or an empty folder")
        report.save()
        with _interruptible():
            _take_all(chosen, report, args, console)
    except KeyboardInterrupt:
        report.interrupted = True
        report.save()
        console.print(f"interrupted; what was done is in {report.folder / 'report.md'}", highlight=False, soft_wrap=True)
        return 130
    except OSError as error:
        console.print(f"gpu_report: {args.out}: {error.strerror or error}", highlight=False, soft_wrap=True)
        return 2 if not report.sections else 1
    print(f"wrote {report.folder / 'report.md'} and {report.folder / 'report.json'}")
    return int(not all(one.result == "done" or one.result.startswith("skipped") for one in report.sections.values()))


def _take_all(steps: Sequence[Step], report: Report, args: argparse.Namespace, console: Console) -> None:
    end = time.monotonic() + 60 * args.minutes
    with progress_bar(console) as progress:
        task = progress.add_task("report", total=len(steps), phase="")
        for i, step in enumerate(steps):
            seconds = (end - time.monotonic()) * step.share / sum(later.share for later in steps[i:])
            if not console.is_terminal:
                console.print(f"{step.name}: at most {max(0, seconds):.0f} s", highlight=False)

            def show(name: str = step.name, until: float = time.monotonic() + seconds) -> None:
                progress.update(task, phase=f"{name}: {max(0, until - time.monotonic()):.0f} s left")

            section = take(step, report.folder / step.name, seconds, args, show)
            report.sections[step.name] = section
            report.save()
            progress.console.print(f"{step.name}: {section.result}, {section.seconds:.0f} s", highlight=False)
            progress.advance(task)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, even where a shell's ``&`` made this process and its children deaf."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_arguments(
    argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS
) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in steps]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, metavar="N", help="for all of it; default %(default)g")
    parser.add_argument("--steps", nargs="+", choices=names, help=f"default: all, {', '.join(names)}")
    parser.add_argument("--device", type=_device, metavar="cuda:N", help="default: the first GPU")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, as small as can be: shows that the steps run")
    args = parser.parse_args(argv)
    if args.rehearse:
        if args.device is not None:
            parser.error("argument --device: not allowed with --rehearse, which runs on the CPU")
        args.device = torch.device("cpu")
        return args, parser
    args.device = args.device or torch.device("cuda", 0)
    if args.device.index >= torch.cuda.device_count():
        parser.error(
            f"needs a GPU that torch can use (CUDA or ROCm): torch {torch.__version__} sees {torch.cuda.device_count()}, "
            f"{args.device} is asked for; --rehearse shows on a CPU that the steps run"
        )
    return args, parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 24 * 60:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected minutes, above 0 and less than a day")
    return minutes


def _device(text: str) -> torch.device:
    kind, colon, index = text.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cuda or cuda:N")
    return torch.device("cuda", int(index or 0))


if __name__ == "__main__":
    raise SystemExit(main())
