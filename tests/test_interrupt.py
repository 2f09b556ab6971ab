"""Ctrl-C: one line, status 130, nothing half-written, no process left behind."""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import small
from ctrl_c import press_ctrl_c
from sampling_cli import checkpoint
from tiny_vae import saved

from ditfast import interrupt
from ditfast.cli import main
from ditfast.images import save_png

ROOT = Path(__file__).resolve().parents[1]
ON_A_TERMINAL = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """As at a terminal: a shell starts what is in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(after: float) -> None:
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()


def stopped(*arguments: object, **options: object) -> Any:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ the one place
@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_second_ctrl_c_does_not_disturb_what_the_first_cleans_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned_up = []

    def command() -> int:
        press(0.2)
        try:
            time.sleep(30)
        finally:
            press(0.1)
            time.sleep(0.5)
            cleaned_up.append(True)
        return 0

    assert interrupt.run("ditfast this", command) == 130
    assert cleaned_up == [True]
    assert capsys.readouterr() == ("", "ditfast this: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_late_second_ctrl_c_ends_the_command_in_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(interrupt, "GRACE", 0.05)
    monkeypatch.setattr(interrupt, "end_at_once", lambda: ends.append(interrupt.STATUS))

    def command() -> int:
        press(0.1)
        try:
            time.sleep(30)
        finally:
            press(0.2)
            time.sleep(0.5)
        return 0

    assert interrupt.run("ditfast this", command) == 130
    assert ends == [130]
    assert capsys.readouterr().err == "ditfast this: interrupted\n"


@pytest.mark.parametrize(("term", "shown"), [("xterm", "\x1b[?25h"), ("dumb", "")])
def test_an_end_at_once_shows_the_cursor_that_a_bar_hid(term: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "__stderr__", stream)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    monkeypatch.setenv("TERM", term)
    interrupt.end_at_once()
    assert stream.getvalue() == shown


def test_the_innermost_words_say_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def command(error: KeyboardInterrupt, inner: Callable[[], str]) -> int:
        with interrupt.keeping(lambda: "outer"), interrupt.keeping(inner):
            raise error

    assert interrupt.run("a", lambda: command(KeyboardInterrupt(), lambda: "3 files\nare there")) == 130
    assert interrupt.run("b", lambda: command(KeyboardInterrupt(), lambda: os.readlink("missing"))) == 130
    assert interrupt.run("c", lambda: command(interrupt.Announced(), lambda: "inner")) == 130
    assert capsys.readouterr().err == "a: interrupted; 3 files are there\nb: interrupted; outer\n"


def test_of_several_ranks_the_first_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, line in (("0", "a: interrupted\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert interrupt.run("a", stopped) == 130
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("argv", "started_as", "expected"),
    [
        ("/venv/bin/ditfast sample", "python /venv/bin/ditfast sample", "ditfast sample"),
        ("/venv/bin/ditfast", "python /venv/bin/ditfast", "ditfast"),
        ("/venv/bin/ditfast --help", "python /venv/bin/ditfast --help", "ditfast"),
        ("-m train --steps 1", "python -u -m ditfast train --steps 1", "ditfast train"),
        ("-m train", "python -mditfast train", "ditfast train"),
        ("-m --rounds 5", "python -m ditfast.benchmarks.training --rounds 5", "benchmarks/training.py"),
        ("-m --rounds 5", "python -m ditfast.benchmarks.bench --rounds 5", "ditfast bench"),
        ("-m", "python -m ditfast.kernels.inspect", "python -m ditfast.kernels.inspect"),
        (f"{ROOT}/benchmarks/bench.py --full", "python benchmarks/bench.py --full", "ditfast bench"),
        (f"{ROOT}/ditfast/benchmarks/host.py", "python ditfast/benchmarks/host.py", "benchmarks/host.py"),
        (f"{ROOT}/benchmarks/bench.py", "python -c spawn_main() --multiprocessing-fork", None),
        ("-m", "python -m pytest ditfast", None),
        ("-m", "python -m ditfaster", None),
        (f"{ROOT}/examples/train_on_digits.py", "python examples/train_on_digits.py", None),
        ("", "python", None),
    ],
)
def test_other_programs_keep_their_ctrl_c(
    argv: str, started_as: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv.split(" "))
    monkeypatch.setattr(sys, "orig_argv", started_as.split())
    assert interrupt._command() == expected


# ------------------------------------------------------------------------------------------------ the commands
def arguments_of(command: str, folder: Path) -> list[str]:
    if command == "extract-latents":
        import numpy as np

        (folder / "images").mkdir()
        save_png(folder / "images" / "a.png", np.zeros((16, 16, 3), np.uint8))
        return [command, "images", "out", "--image-size", "16", "--vae", str(saved(folder / "vae"))]
    return {
        "doctor": ["doctor"],
        "sample": ["sample", "--out", "grid.png"],
        "train": ["train", "--data", "digits", "--steps", "2", "--out", "out"],
        "evaluate": ["evaluate", "images", "--reference", "digits"],
        "convert": ["convert", str(checkpoint(folder / "dit.safetensors", small())), "out", "--to", "diffusers"],
        "compile": ["compile", "--arch", "sm_90", "--model", "digits"],
        "bench": ["bench", "--models", "DiT-S/8", "--dtype", "fp32", "--rivals", "eager", "--out", "out"],
    }[command]


STOPPED_IN = {
    "doctor": ("ditfast.commands.doctor._parity", "interrupted"),
    "sample": ("ditfast.sampling.Sampler.__call__", "interrupted; grid.png was not written"),
    "train": ("ditfast.commands.train.Trainer", "interrupted; no checkpoint was written"),
    "extract-latents": (
        "ditfast.vae.encode_moments",
        "interrupted; out: 0 of 1 shards are there; the same command writes the rest",
    ),
    "evaluate": ("ditfast.evaluation.command.open_images", "interrupted"),
    "convert": ("ditfast.checkpoints.save.checked", "interrupted; out was not written"),
    "compile": ("triton.compile", "interrupted; 0 of "),
    "bench": ("ditfast.benchmarks.bench.bench_case", "interrupted; rows in out/bench.json: 0"),
}
NEEDS = {"train": "sklearn", "extract-latents": "diffusers", "compile": "triton", "bench": "matplotlib"}


@pytest.mark.parametrize("command", STOPPED_IN)
def test_a_command_says_what_it_kept(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(NEEDS.get(command, "torch"))
    monkeypatch.chdir(tmp_path)
    arguments = arguments_of(command, tmp_path)
    place, line = STOPPED_IN[command]
    monkeypatch.setattr(place, stopped)
    assert main(arguments) == 130
    *others, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"ditfast {command}: {line}")
    assert not [other for other in others if "Traceback" in other]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_inspect_takes_its_bar_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "argv", ["inspect.py", "--arch", "sm_80", "--kernel", "gated_residual"])
    monkeypatch.setattr("ditfast.terminal.track_progress", stopped)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("ditfast.kernels.inspect", run_name="__main__")
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "python -m ditfast.kernels.inspect: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
def test_ctrl_c_does_not_reach_the_compilers_of_kernels() -> None:
    ahead = pytest.importorskip("ditfast.kernels.ahead")
    program = [sys.executable, "-c", "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"]
    blocked = ahead.on_threads(lambda _: subprocess.check_output(program, text=True).strip(), range(2), 2)
    assert list(blocked) == ["True", "True"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# ------------------------------------------------------------------------------------------------ on a terminal
CHILDREN = """
import multiprocessing, subprocess, sys, time
from ditfast import interrupt
def child():
    subprocess.run(["sleep", "60"])
def main():
    print("begin", flush=True)
    with interrupt.shielding_children():
        pool = multiprocessing.get_context("spawn").Pool(1)
    pool.apply_async(child)
    time.sleep(60)
if __name__ == "__main__":
    sys.exit(interrupt.run("children", main))
"""


@ON_A_TERMINAL
def test_children_are_gone_and_silent(tmp_path: Path) -> None:
    (tmp_path / "children.py").write_text(CHILDREN)
    ended = press_ctrl_c([sys.executable, "children.py"], "begin", cwd=tmp_path)
    assert ended == (130, ["children: interrupted"], [])


@ON_A_TERMINAL
def test_compile_keeps_what_is_compiled(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "ditfast", "compile", "--arch", "sm_80", "--model", "DiT-S/2", "--batch", "2"]
    ended = press_ctrl_c(command, "[1-9][0-9]*/[0-9]", times=2, cwd=tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert (ended.status, ended.left) == (130, [])
    (line,) = ended.lines
    assert line.startswith("ditfast compile: interrupted; ")
    assert line.endswith(f"kernels are in {tmp_path / 'cache'}; the same command compiles the rest")
    assert list((tmp_path / "cache").glob("*/*.ptx"))
    assert not list((tmp_path / "cache").glob("*/tmp*"))


@ON_A_TERMINAL
@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.full), 2])
def test_while_it_is_imported_a_command_ends_with_one_line(times: int, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ditfast", "doctor"]
    ended = press_ctrl_c(command, "torch._C", times=times, cwd=tmp_path)
    assert ended.status == 130
    assert [line for line in ended.lines if not line.startswith("import time:")] == ["ditfast doctor: interrupted"]


@ON_A_TERMINAL
@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.full), 2])
def test_train_says_what_it_does_and_what_a_second_ctrl_c_costs(times: int, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [
        sys.executable,
        "-m",
        "ditfast",
        "train",
        "--data",
        "digits",
        "--steps",
        "9999",
        "--batch",
        "8",
        "--workers",
        "1",
    ]
    ended = press_ctrl_c([*command, "--out", "run"], "[1-9]/9999", times=times, cwd=tmp_path)
    assert (ended.status, ended.left) == (130, [])
    first, second = (line for line in ended.lines if line.startswith("ditfast"))  # the others are the progress bar's
    assert first.startswith("ditfast train: Ctrl-C: writes a checkpoint behind this step and ends, in about ")
    checkpoints = list((tmp_path / "run").glob("checkpoints/*"))
    if checkpoints or times == 1:  # else it was written before the second
        assert second.startswith("ditfast train: stopped at step ")
        assert f"which run/checkpoints/{checkpoints[0].name} holds; --resume auto goes on from there" in second
    else:
        assert second.startswith("ditfast train: interrupted at once; lost: ")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


@ON_A_TERMINAL
@pytest.mark.full
@pytest.mark.parametrize("until", ["compiling [0-9]+ model", "round [0-9]+"], ids=["compiling", "timing"])
def test_bench_keeps_its_rows_and_ends_its_compilers(until: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rivals = ["eager", "compile"] if until.startswith("compiling") else ["eager"]
    command = [sys.executable, str(ROOT / "benchmarks/bench.py"), "--models", "DiT-S/8", "--dtype", "fp32", "--rounds", "2000"]
    ended = press_ctrl_c(
        [*command, "--rivals", *rivals, "--out", "out"],
        until,
        times=2,
        cwd=tmp_path,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    lines = [line for line in ended.lines if line.startswith("ditfast")]  # the others are the progress bar's
    assert (ended.status, lines, ended.left) == (130, ["ditfast bench: interrupted; rows in out/bench.json: 0"], [])
    assert "interrupted: later rows are missing" in (tmp_path / "out" / "bench.json").read_text()
