"""Output of commands and benches: on terminals of 80 and 200 columns, into a pipe, and under NO_COLOR."""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import WHERE, randomize
from tiny_vae import saved

import ditfast
from ditfast import terminal
from ditfast.benchmarks import bench, digits_quality, kernels, sampling, training
from ditfast.cli import main
from ditfast.commands import tune
from ditfast.dispatch.shapes import OpShape
from ditfast.evaluation import command as evaluation
from ditfast.evaluation.report import Report, Score
from ditfast.terminal import HelpFormatter, fold, make_console, new_table, print_table, say, track_progress
from ditfast.tuning.measure import Measured

pytestmark = pytest.mark.usefixtures("one_thread")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLORS = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")
LONG_OP = "gated_residual_layer_norm_modulate"
TINY = ditfast.DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


# ------------------------------------------------------------------------------------------------ what is printed
def doctor(folder: Path, _: pytest.MonkeyPatch) -> int:
    return main(["doctor"])


def without_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("shutil.which", lambda name: None)  # the longer of two ways to call it
    return main([])


def sample(folder: Path, _: pytest.MonkeyPatch) -> int:
    return main(["sample", "--out", str(folder / "a.png"), "--per-class", "1", "--steps", "ddim2", "--device", "cpu"])


def train(folder: Path, _: pytest.MonkeyPatch) -> int:
    return main(["train", "--data", "digits", "--steps", "2", "--batch", "8", "--out", str(folder / "run"), "--device", "cpu"])


def extract_latents(folder: Path, _: pytest.MonkeyPatch) -> int:
    from extraction import SIZE, photographs

    photographs(folder / "photographs", 4)
    arguments = [str(folder / "photographs"), str(folder / "latents"), "--vae", str(saved(folder / "vae"))]
    return main(["extract-latents", *arguments, "--image-size", str(SIZE), "--device", "cpu"])


def evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    scores = [Score(name, name, "lower", 1234.5678, 0.5, 82) for name in ("Frechet distance", "spatial Frechet distance")]
    report = Report("samples", 50_000, "VIRTUAL_imagenet256_labeled.npz", 10_000, "Inception", scores, ["a note " * 20])
    monkeypatch.setattr(evaluation, "_evaluate", lambda args: report)
    return main(["evaluate", "samples", "--reference", "others"])


def convert(folder: Path, _: pytest.MonkeyPatch) -> int:
    ditfast.save_checkpoint(randomize(ditfast.DiT(TINY)), folder / "a.safetensors")
    return main(["convert", str(folder / "a.safetensors"), str(folder / "b.pt"), "--to", "official"])


def compile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    if WHERE == "interpreter":
        pytest.skip("kernels were jitted for the interpreter, which compiles nothing")
    from ditfast.kernels import ahead

    monkeypatch.setattr(ahead, "compile_all", lambda builds, jobs: (ahead.Outcome(build, 1.5, False) for build in builds))
    return main(["compile", "--arch", "sm_80", "--model", "digits"])


def tune_report(folder: Path, _: pytest.MonkeyPatch) -> int:
    problems = [OpShape(LONG_OP, torch.bfloat16, rows, (256, 1152), training=True) for rows in (8192, 256)]
    with tune._progress() as show:
        show(f"{LONG_OP}: backends", 1, 2)
    tune._report([Measured(one, 1, {"torch": 0.123456, "triton": 0.05}, notes=["a note"]) for one in problems], folder)
    return 0


def bench_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    ditfast.save_checkpoint(randomize(ditfast.DiT(TINY)), folder / "a.safetensors")
    monkeypatch.setattr("ditfast.benchmarks.timing.SHORTEST_ROUND_S", 0.001)
    monkeypatch.setattr(bench, "save_plots", lambda out, rows: [])
    monkeypatch.setattr(bench, "digits_case", lambda dtype, device: bench.random_case("digits", TINY, 2, device, dtype))
    arguments = ["--checkpoint", str(folder / "a.safetensors"), "--rivals", "eager", "ditfast", "--rounds", "5"]
    return bench.main([*arguments, "--dtype", "fp32", "--device", "cpu", "--out", str(folder / "out")])


def sampling_bench(folder: Path, _: pytest.MonkeyPatch) -> int:
    row = sampling.Row("ditfast-torch", 123.45, 1234.5, 0.0123, 12.34, 1.2e-7)
    print_table(sampling._table([row]), make_console(piped=80), "XL width, 28 blocks, patch 2, 250 steps, CFG 4, batch 32")
    return 0


def training_bench(folder: Path, _: pytest.MonkeyPatch) -> int:
    row = training.Row("DiT-XL/2", "ditfast-compile:bf16:checkpoint", 32, "cuda", 123.4, 0.5, 123.4)
    row.ms_median, row.ms_p20, row.ms_p80, row.images_per_s, row.mfu = 1234.5, 1234.5, 1234.5, 1234.5, 0.45
    training._print(make_console(piped=80), [row])
    return 0


def quality_bench(folder: Path, _: pytest.MonkeyPatch) -> int:
    spread = digits_quality.Spread(12.345, 1.234)
    names = ("fp32", "offload_conditioning")
    rows = [digits_quality.Row(name, [], [], spread, spread, spread, spread, False) for name in names]
    print_table(digits_quality._table(rows), make_console(), "Digits, 500 images a seed")
    return 0


def kernels_bench(folder: Path, _: pytest.MonkeyPatch) -> int:
    label = (LONG_OP, "forward+backward", "DiT-XL/2", 32)
    found = [kernels.Found(*label, name, 40000.0, 1234.5, 0.0, 0.91) for name in kernels.IMPLEMENTATIONS]
    kernels.print_tables(make_console(), found)
    return 0


def inspect(folder: Path, _: pytest.MonkeyPatch) -> int:
    pytest.importorskip("triton")
    from ditfast.kernels import inspect as tool

    counts: tuple[Any, ...] = (255, 0, 232448, 0.25, 12345.0, "step", 0.0, {"HGMMA.64x256x16": 8}, {128: 4}, 0.9, 1.0, 1.5)
    row = tool.Row(LONG_OP, "XL/2 b32 D=1152 bf16", "128x256x64 8w 4s", "sm_90", *counts, ["90% of the issue budget, over 80%"])
    tool.report([row, row], ["sm_90"])
    return 0


COMMANDS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], int], list[str]]] = {
    "ditfast": (without_arguments, ["python -m ditfast sample", "acceleration_report(model)", "pip install 'ditfast[bench]'"]),
    "doctor": (doctor, [LONG_OP, "linears=29 N=195840 K=1152", "parity with the float64 reference", "scikit-learn"]),
    "sample": (sample, ["a.png: 10 images", "guidance 2"]),
    "train": (train, ["model.safetensors: 2 steps of 8"]),
    "extract-latents": (extract_latents, ["latents: 4 images of 2 classes"]),
    "evaluate": (evaluate, ["spatial Frechet distance", "VIRTUAL_imagenet256_labeled.npz", "1234.568", "82.000"]),
    "convert": (convert, ["official layout"]),
    "compile": (compile, [LONG_OP, "specialisations", "compiled, 0 already there"]),
    "tune": (tune_report, [LONG_OP, "T=256 D=1152", "123.5"]),
    "bench": (bench_tables, ["How many times faster than", "a.safetensors fp32 batch 1", "wrote"]),
    "sampling": (sampling_bench, ["ditfast-torch", "1234.5", "1.2e-07"]),
    "training": (training_bench, ["ditfast-compile:bf16:checkpoint", "123.4", "45%"]),
    "digits_quality": (quality_bench, ["offload_conditioning", "12.345 ± 1.234", "more than noise"]),
    "kernels": (kernels_bench, [LONG_OP, "1234 GB/s", "91%"]),
    "inspect": (inspect, [LONG_OP, "128x256x64 8w 4s", "HGMMA.64x256x16", "12345/step", "90% of the issue budget, over 80%"]),
}
MODES: dict[str, tuple[str, ...]] = {"80": (), "200": (), "piped": (), "no-color": ("NO_COLOR",)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMMANDS)
def test_output_of(name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    for variable in ("NO_COLOR", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable in MODES[mode]:
        monkeypatch.setenv(variable, "1")
    columns = {"80": 80, "no-color": 80, "200": 200}.get(mode)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    out, err = (Screen(), Screen()) if columns else (io.StringIO(), io.StringIO())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    command, expected = COMMANDS[name]
    assert command(Path("."), monkeypatch) == 0, err.getvalue()
    shown = out.getvalue() + err.getvalue()
    plain = ESCAPES.sub("", shown)
    words = " ".join(plain.split())
    assert not [text for text in expected if text not in words]
    lines = [part.rstrip() for line in plain.split("\n") for part in line.split("\r")]
    assert not [line for line in lines if "\N{HORIZONTAL ELLIPSIS}" in line]
    if columns:
        assert not [line for line in lines if len(line) > columns]
    if mode == "no-color":
        assert not COLORS.search(shown)
    if mode == "piped":
        assert not re.search("[\x1b\r]", shown)


# ------------------------------------------------------------------------------------------------ the parts
def test_a_terminal_says_how_wide_it_is(tmp_path: Path) -> None:
    """One process on a terminal of 80 columns: progress, a table, and a line that is too long."""
    program = (
        "from ditfast.terminal import *\n"
        "with track_progress('bench', 3) as progress:\n"
        "    for phase in ('first', 'a phase with a name ' * 6):\n"
        "        progress.update(phase); progress.advance(); progress._bar.refresh()\n"
        "table = new_table('op', 'sizes', 'why'); table.add_row('an_op_with_a_long_name' * 3, 'T=256 ' * 4, 'because ' * 9)\n"
        "print_table(table, make_console(), 'a title'); say('word ' * 40)\n"
    )
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=child, stdout=child, stderr=child, env={**environment, "TERM": "xterm"}
    )
    os.close(child)
    shown = b""
    while part := _read(parent):
        shown += part
    os.close(parent)
    assert process.wait() == 0, shown.decode()
    plain = ESCAPES.sub("", shown.decode())
    lines = [part.rstrip() for line in plain.split("\n") for part in line.split("\r")]
    assert max(map(len, lines)) <= 80
    assert any(len(line) > 70 for line in lines)
    assert max(len(line) for line in lines if "━" in line) <= 80 - len("^C^C")  # which terminals write behind them
    for expected in ("2/3", "a phase with a name", "an_op_with_a_long_name" * 3, "T=256 T=256", "a title"):
        assert expected in plain


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # nobody has the terminal open any more
        return b""


def printed(width: int, table: Any) -> list[str]:
    out = io.StringIO()
    console = make_console()
    console.file, console.width = out, width
    print_table(table, console)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_table_keeps_words_whole() -> None:
    def table() -> Any:
        made = new_table("op", "why", right=("ms",))
        made.add_row("a_long_name", "one two [three] :b:", "1.5")
        made.add_row("b", "", "12")
        return made

    assert printed(80, table()) == [
        "op           why                   ms",
        "a_long_name  one two [three] :b:  1.5",
        "b                                  12",
    ]
    assert printed(30, table()) == [
        "op           why            ms",
        "a_long_name  one two       1.5",
        "             [three] :b:",
        "b                           12",
    ]
    assert printed(16, table()) == ["a_long_name", "  why one two", "  [three] :b:;", "  ms 1.5", "b", "  ms 12"]


def test_examples_that_are_too_long_can_still_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "42")  # of which argparse leaves two
    text = "A paragraph\nof words that is wider than the terminal is.\n\n"
    text += "  run --a 1   short\n  run --a 1 --b 2 --c 3 --d 4 --e 5    does it"
    parser = argparse.ArgumentParser(prog="run", epilog=text, formatter_class=HelpFormatter, add_help=False)
    shown = parser.format_help().split("\n\n", 1)[1].splitlines()
    assert shown == [
        "A paragraph of words that is wider than",
        "the terminal is.",
        "",
        "  run --a 1   short",
        "  run --a 1 --b 2 --c 3 --d 4 \\",
        "      --e 5",
        "      # does it",
    ]


def test_help_of_an_option_keeps_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "62")
    parser = argparse.ArgumentParser(prog="run", formatter_class=HelpFormatter, add_help=False)
    parser.add_argument("--kind", help="of\n  one, two, openvino-int8, ditfast-int8+table; default: all of them")
    shown = parser.format_help().split("options:\n")[1].splitlines()
    assert [line.strip() for line in shown] == [
        "--kind KIND  of one, two, openvino-int8,",
        "ditfast-int8+table; default: all of them",
    ]


def test_a_word_is_never_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    say(f"wrote {'/folder' * 5} [red] :b:")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == ["wrote", "/folder" * 5, "[red] :b:"]


def test_lines_of_progress_come_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    with track_progress("sampling", 100, "images") as progress:
        for _ in range(100):  # a second each
            progress.update("a phase")
            progress.advance()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 3 <= len(lines) <= 8
    assert all(re.match(r"sampling \d+/100 images, .*0:0\d:\d\d, a phase$", line) for line in lines)
    with track_progress("sampling", 100, "images", quiet=True) as progress:
        for _ in range(100):
            progress.advance()
    assert capsys.readouterr() == ("", "")


def on_screen(shown: str) -> list[str]:
    """Return the lines that a wide terminal has after what was written to it."""
    lines, row, column = [""], 0, 0
    for part in re.findall("\x1b\\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", shown):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part[0] == "\x1b":
            row -= int(part[2:-1])
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] != "\x1b":
            lines[row] = lines[row][:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_a_line_of_another_thread_stands_whole_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Screen())
    line = "ditfast train: Ctrl-C: " + "words " * 10 + "end"
    with track_progress("training", 9, "steps") as progress:
        for step in range(1, 4):
            progress.update(f"loss {step}", step)
            progress._bar.refresh()
            if step == 2:
                thread = threading.Thread(target=terminal.print_line, args=(line,))
                thread.start()
                thread.join()
        lines = on_screen(progress._bar.console.file.getvalue())  # type: ignore[attr-defined]
    assert lines[0] == line
    assert lines[1].startswith("training ")
    assert lines[2:] == ["loss 3"]
    terminal.print_line(line)
    assert sys.stderr.getvalue().endswith(f"{line}\n")  # type: ignore[attr-defined]


def test_what_is_printed_while_a_bar_is_shown_stands_whole_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    console = make_console()
    with track_progress("host", 9) as progress:
        progress.update("a phase", 1)
        progress._bar.refresh()
        table = new_table("op", right=("us",))
        table.add_row("linear", "1.5")
        print_table(table, console, "a title")
        progress._bar.refresh()
        lines = on_screen(screen.getvalue())
    assert lines[:3] == ["a title", "op       us", "linear  1.5"]
    assert lines[3].startswith("host ")
    assert lines[4:] == ["a phase"]


def test_a_pipe_under_force_color_has_no_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with track_progress("sampling", 10) as progress:
        progress.advance(10)
    assert capsys.readouterr() == ("", "")


def test_messages_that_repeat_are_one_line() -> None:
    found = fold([*((f"kernel {k}", "no space") for k in range(5)), ("a", "x"), ("b", "x"), ("alone", "y"), ("no subject", "")])
    assert found == ["kernel 0 and 4 more: no space", "a and b: x", "alone: y", "no subject"]
