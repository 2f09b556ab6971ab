"""One name for a command in all of its messages, whichever way it was started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_cuda import fake_cuda
from support import WHERE, randomize

import ditfast
from ditfast.benchmarks import bench, cpu_tables, digits_quality, gpu_first, host, sampling, training
from ditfast.benchmarks.results import read
from ditfast.cli import COMMANDS, main
from ditfast.devices import default_device

Main = Callable[[list[str]], int]
MAINS: dict[str, Main] = {
    "ditfast bench": bench.main,
    "benchmarks/cpu_tables.py": cpu_tables.main,
    "benchmarks/digits_quality.py": digits_quality.main,
    "benchmarks/gpu_first.py": gpu_first.main,
    "benchmarks/host.py": host.main,
    "benchmarks/sampling.py": sampling.main,
    "benchmarks/training.py": training.main,
    **{f"ditfast {name}": lambda arguments, name=name: main([name, *arguments]) for name in (*COMMANDS, "bench")},  # type: ignore[misc]
}
STARTS = ("/usr/bin/ditfast", "/site-packages/ditfast/__main__.py", "benchmarks/bench.py")


def said(call: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what a command that is refused says on stderr."""
    with pytest.raises(SystemExit) as exit_:
        call(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("start", STARTS, ids=["script", "module", "file"])
@pytest.mark.parametrize("name", MAINS)
def test_messages_of(name: str, start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [start])
    usage, *_, last = said(MAINS[name], ["--no-such-option"], capsys)
    assert usage.startswith(f"usage: {name} ")
    assert last.startswith(f"{name}: error: ")


@pytest.mark.parametrize("name", MAINS)
def test_help_fits(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        MAINS[name](["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name} ")
    assert not [line for line in shown.splitlines() if len(line) > 80]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("call", [bench.main, lambda arguments: main(["bench", *arguments])], ids=["file", "command"])
def test_a_bench_has_one_name(
    call: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py"])
    monkeypatch.setattr("ditfast.benchmarks.timing.SHORTEST_ROUND_S", 0.001)
    monkeypatch.setattr(bench, "save_plots", lambda out, rows: [])
    config = ditfast.DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
    monkeypatch.setattr(bench, "digits_case", lambda dtype, device: bench.random_case("digits", config, 2, device, dtype))
    ditfast.save_checkpoint(randomize(ditfast.DiT(config)), tmp_path / "a.safetensors")
    arguments = ["--device", "cpu", "--dtype", "fp32", "--rivals", "eager", "--rounds", "5", "--out", str(tmp_path / "out")]
    assert call(["--checkpoint", str(tmp_path / "a.safetensors"), *arguments]) == 0
    assert str(read(tmp_path / "out/bench.json").command).startswith("ditfast bench --checkpoint ")
    assert said(call, arguments, capsys)[-1].startswith("ditfast bench: error: argument --out: got ")
    (tmp_path / "notes.txt").write_text("no weights")
    assert call(["--checkpoint", str(tmp_path / "notes.txt"), *arguments[:-1], str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith("ditfast bench: ")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^ditfast bench: needs matplotlib and sklearn: pip install "):
        call([*arguments[:-1], str(tmp_path / "third")])


def test_a_gpu_that_is_too_old_is_told_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_cuda(name="NVIDIA T4", capability=(7, 5)):
        assert default_device("ditfast doctor").type == "cpu"
    assert capsys.readouterr().err.startswith("ditfast doctor: warning: NVIDIA T4 has compute capability 7.5")


@pytest.mark.skipif(WHERE == "interpreter", reason="kernels were jitted for the interpreter, which compiles nothing")
@pytest.mark.parametrize("kind", ["same path", "path of each kernel"])
def test_errors_of_the_kernel_cache_are_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ditfast.kernels import ahead, inspect

    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file/cache"))
    if kind == "path of each kernel":

        def refused(builds: list[ahead.Build], jobs: int) -> list[ahead.Outcome]:
            errors = (f"PermissionError: [Errno 13] Permission denied: '{tmp_path}/file/cache/{k}'" for k in range(len(builds)))
            return [ahead.Outcome(build, 0.1, False, error) for build, error in zip(builds, errors, strict=True)]

        monkeypatch.setattr(ahead, "compile_all", refused)
    assert main(["compile", "--arch", "sm_80", "--model", "digits"]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("ditfast compile: ")
    assert f"'{tmp_path}/file/cache'" in line
    (failed,) = (word for word in out.split(", ") if "FAILED" in word)
    assert f"and {int(failed.split()[0]) - 1} more: " in line
    if kind == "same path":
        with pytest.raises(SystemExit) as exit_:
            inspect.main(["--arch", "sm_80", "--kernel", "linear"])
        assert exit_.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m ditfast.kernels.inspect: ")


# ------------------------------------------------------------------------------------------------ results are kept
BENCHES: dict[str, Main] = {"sampling": sampling.main, "training": training.main, "digits_quality": digits_quality.main}


@pytest.mark.parametrize("name", [*BENCHES, "bench"])
def test_results_of_another_run_are_kept(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"rows": []}))
    last = said({**BENCHES, "bench": bench.main}[name], ["--out", str(tmp_path)], capsys)[-1]
    assert last.endswith(f"got '{tmp_path}', which has {name}.json of an earlier run: give another folder, or remove it")
    assert json.loads(path.read_text()) == {"rows": []}


def test_a_grid_of_another_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_text("somebody's")
    last = said(MAINS["ditfast sample"], ["--out", str(tmp_path / "a.png")], capsys)[-1]
    assert last.endswith(f"got '{tmp_path / 'a.png'}', which exists already: give another name, or remove it")
    assert (tmp_path / "a.png").read_text() == "somebody's"
