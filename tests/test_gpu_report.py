"""The report of a first hour on a GPU: its steps as stand-ins that fail, hang and lie; its command lines by their parsers."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfast import cli
from ditfast.benchmarks import bench, cut_off, gpu_report, sampling, training
from ditfast.benchmarks.gpu_report_steps import (
    ROOT,
    STEPS,
    Step,
    printed,
    read_bench,
    read_json_of,
    read_kernels,
    read_tests,
    read_tune,
)
from ditfast.benchmarks.kernels import Found
from ditfast.benchmarks.rivals import random_case
from ditfast.benchmarks.rows import new_row
from ditfast.config import DiTConfig

BY_NAME = {step.name: step for step in STEPS}
SLOW = "import time; print('begun'); time.sleep(60)"


def step(name: str, script: str | None, read: Any = printed, modules: Sequence[str] = ()) -> Step:
    words = script and ("-c", script.replace("{", "{{").replace("}", "}}"))
    return Step(name, name.title(), 1, words or (), words, read, modules)


def report(folder: Path, *steps: Step, arguments: Sequence[str] = ()) -> tuple[int, dict[str, Any], str]:
    status = gpu_report.main(["--out", str(folder), "--rehearse", *arguments], steps)
    return status, json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def ended(process: int) -> bool:
    """It is gone, or dead and nobody asked for its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


# ------------------------------------------------------------------------------------------------ what becomes of steps
def test_steps_that_end_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found, page = report(tmp_path / "out", step("first", "print('one ```')"), step("second", "print(2)"))
    assert status == 0
    assert [one["result"] for one in found["steps"].values()] == ["done", "done"]
    assert found["rehearsal"]
    assert gpu_report.REHEARSAL in page
    assert "```text\none '''\n```" in page
    assert f"{tmp_path / 'out' / 'report.md'}" in capsys.readouterr().out


def test_a_step_that_fails_costs_its_section(tmp_path: Path) -> None:
    status, found, page = report(
        tmp_path / "out", step("broken", "import sys; sys.exit('no such GPU')"), step("fine", "print(1)")
    )
    assert status == 1
    assert [one["result"] for one in found["steps"].values()] == ["failed: status 1", "done"]
    assert "no such GPU" in page


def test_a_step_is_cut_off_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_off, "GRACE_S", 0.3)
    child = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLOW!r}]).pid); "
    deaf = child + f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {SLOW}"
    begin = time.monotonic()
    status, found, _ = report(tmp_path / "out", step("hangs", deaf), step("fine", "print(1)"), arguments=["--minutes", "0.05"])
    assert time.monotonic() - begin < 5
    assert status == 1
    assert [one["result"] for one in found["steps"].values()] == ["cut off: its time was up", "done"]
    assert ended(int((tmp_path / "out/hangs/stdout.txt").read_text().split()[0]))


def test_a_step_that_is_cut_off_may_still_write(tmp_path: Path) -> None:
    script = (
        "import time, json\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open('x.json', 'w').write('{\"notes\": [\"half\"]}')"
    )
    _, found, page = report(tmp_path / "out", step("half", script, read_json_of("x.json")), arguments=["--minutes", "0.03"])
    assert found["steps"]["half"]["data"] == {"notes": ["half"]}
    assert "- half" in page


def test_without_time_left_steps_are_skipped(tmp_path: Path) -> None:
    _, found, _ = report(tmp_path / "out", step("late", "print(1)"), arguments=["--minutes", "0.001"])
    assert found["steps"]["late"]["result"] == "skipped: the time was up"
    assert not (tmp_path / "out/late").exists()


def test_what_is_not_used_goes_to_later_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tmp_path / "out", step("first", "print(1)"), step("second", "print(2)"), arguments=["--minutes", "0.5"])
    said = [line for line in capsys.readouterr().err.splitlines() if "at most" in line]
    assert said[0] == "first: at most 15 s"
    assert int(said[1].split()[-2]) > 15


def test_steps_that_lack_something_are_skipped(tmp_path: Path) -> None:
    lacking = step("lacking", "print(1)", modules=("json", "no_such_pytest"))
    status, found, _ = report(tmp_path / "out", lacking, step("gpu", None))
    assert status == 0
    assert found["steps"]["lacking"]["result"].startswith("skipped: no_such_pytest not installed")
    assert found["steps"]["gpu"]["result"] == "skipped: needs a GPU"


@pytest.mark.parametrize(
    ("read", "file"),
    [(read_tests, "tests.xml"), (read_bench, "bench.json"), (read_kernels, "kernels.json"), (read_json_of("x.json"), "x.json")],
    ids=["tests", "bench", "kernels", "x"],
)
@pytest.mark.parametrize("garbage", ["{", "[]", '{"rows": 3, "benchmarks": 3}', "<a/>"])
def test_garbage_costs_its_section(tmp_path: Path, read: Any, file: str, garbage: str) -> None:
    (tmp_path / file).write_text(garbage)
    for name in ("stdout.txt", "stderr.txt"):
        (tmp_path / name).write_text("")
    (note,) = gpu_report._read(step("liar", "", read), tmp_path, 0).notes
    assert note.startswith("it left nothing that can be read: ")


def test_chosen_steps_only(tmp_path: Path) -> None:
    steps = (step("first", "print(1)"), step("second", "print(2)"))
    _, found, _ = report(tmp_path / "out", *steps, arguments=["--steps", "second"])
    assert list(found["steps"]) == ["second"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, number: int) -> None:
    def interrupt() -> None:
        begun = tmp_path / "out/hangs/stdout.txt"
        while not (begun.exists() and begun.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    status, found, page = report(tmp_path / "out", step("fine", "print(1)"), step("hangs", SLOW), step("later", "print(3)"))
    assert status == 130
    assert list(found["steps"]) == ["fine"]
    assert found["interrupted"]
    assert "Interrupted" in page


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs a GPU that torch can use"),
        (["--device", "cuda:9"], "cuda:9 is asked for"),
        (["--device", "tpu"], "expected cuda or cuda:N"),
        (["--device", "cuda:0", "--rehearse"], "not allowed with --rehearse"),
        (["--rehearse", "--minutes", "0"], "above 0"),
        (["--rehearse", "--minutes", "nan"], "above 0"),
        (["--rehearse", "--steps", "dance"], "invalid choice"),
    ],
    ids=["no GPU", "no such GPU", "tpu", "both", "no time", "nan", "no such step"],
)
def test_refusals(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(SystemExit):
        report(tmp_path)
    assert "expected a new or an empty folder" in capsys.readouterr().err


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert gpu_report.main(["--out", str(tmp_path / "file/out"), "--rehearse"], [step("first", "print(1)")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_folder_that_goes_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = step("gone", f"import shutil; shutil.rmtree({str(tmp_path / 'out')!r})", read_json_of("x.json"))
    assert gpu_report.main(["--out", str(tmp_path / "out"), "--rehearse"], [step("fine", "print(1)"), gone]) == 1
    assert "No such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what is read
def test_the_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, signal, pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
        "def test_d():\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # who runs this may be deaf to it
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "def test_e(): pass\ndef test_f(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "--junit-xml", "tests.xml", "test_it.py"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}  # a plugin's options too
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = read_tests(tmp_path, done.stdout)
    counts = {"passed": 1, "failed": 1, "errors": 0, "skipped": 1, "left_out": 3}
    assert {name: found.data[name] for name in counts} == counts
    assert found.blocks[0] == "1 passed, 1 failed, 0 errors, 1 skipped, 3 left out"
    assert found.blocks[1] == "- `test_it::test_b`: assert 1 == 2"
    assert "3 tests were left out: the time was up" in found.notes


def test_a_bench_is_set_beside_what_was_predicted(tmp_path: Path) -> None:
    case = random_case("DiT-S/8", DiTConfig.from_name("DiT-S/8"), 1, torch.device("cpu"), "bf16")
    row = dataclasses.replace(new_row(case, "ditfast", 1e-3, 1e-2), ms_median=1.0, ms_p20=1.0, ms_p80=1.0)
    row = dataclasses.replace(row, images_per_s=1e3, tflops_per_s=0.7, peak_memory_gb=1.0)
    content = {"environment": {"device": "NVIDIA H100 80GB HBM3"}, "rows": [dataclasses.asdict(row)], "notes": ["slow"]}
    (tmp_path / "bench.json").write_text(json.dumps(content))
    (tmp_path / "ratios.png").touch()
    found = read_bench(tmp_path, "")
    assert found.data == content
    assert found.notes == ["slow"]
    table, plot, beside = found.blocks
    assert "A forward of the batch" in table
    assert plot == f"![ratios]({tmp_path.name}/ratios.png)"
    assert "measured, ms | predicted, ms" in beside
    (tmp_path / "bench.json").write_text(json.dumps({**content, "environment": {"device": "a toaster"}}))
    assert "nothing predicted to set beside it" in read_bench(tmp_path, "").notes[-1]


def test_kernels_times_are_tables_again(tmp_path: Path) -> None:
    assert read_kernels(tmp_path, "").notes == ["nothing was timed"]
    one = Found("linear", "forward", "DiT-XL/2", 32, "triton", 200.0, 1234.5, 612.3, None)
    infos = [{"extra_info": {**dataclasses.asdict(one), "calls": 16}}, {"extra_info": {}}]
    (tmp_path / "kernels.json").write_text(json.dumps({"benchmarks": infos}))
    found = read_kernels(tmp_path, "")
    assert found.data == [dataclasses.asdict(one)]
    assert "612 TFLOP/s" in found.blocks[0]


def test_the_tuning_record_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "nvidia h100.json").write_text('{"entries": []}')
    found = read_tune(tmp_path, f"Fastest\n3 of 4 problems are in {tmp_path}/nvidia h100.json\n")
    assert found.data == {"entries": []}
    assert "Fastest" in found.blocks[0]
    assert read_tune(tmp_path, "").data is None


# ------------------------------------------------------------------------------------------------ what is run
def parse(command: list[str], config: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser of whatever it runs, which raises where it does not parse."""
    assert command[:2] == [sys.executable, "-m"]
    module, *arguments = command[2:]
    if module == "ditfast":
        cli._parser().parse_args(arguments)
    elif module == "ditfast.benchmarks.bench":
        bench.parse_arguments(arguments)
    elif module == "pytest":
        config._parser.parse(arguments)
        assert all(Path(word).exists() for word in arguments if word.startswith(f"{ROOT}/"))
    else:
        parsed_and_no_more(module, arguments, monkeypatch)


class ParsedError(Exception):
    pass


def parsed_and_no_more(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise ParsedError

    benches = {"ditfast.benchmarks.training": (training, "measure"), "ditfast.benchmarks.sampling": (sampling, "measure")}
    bench_module, last = benches[module]
    monkeypatch.setattr(bench_module, last, stop)
    if bench_module is sampling:
        monkeypatch.setattr(
            sampling, "Setting", lambda *args: type("Setting", (), {"rivals": known_rivals, "device": args[-1]})()
        )
    with pytest.raises(ParsedError):
        bench_module.main(arguments)


def known_rivals(setting: Any) -> dict[str, Any]:
    return dict.fromkeys(("reference", "ditfast", "ditfast-bf16"))


@pytest.mark.parametrize("rehearse", [False, True], ids=["on a GPU", "rehearsal"])
@pytest.mark.parametrize("name", BY_NAME)
def test_command_lines_parse(
    name: str, rehearse: bool, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = BY_NAME[name].command(tmp_path, 60.0, rehearse=rehearse)
    if command is None:
        assert rehearse
        return
    assert "{" not in shlex.join(command)
    parse(command, pytestconfig, monkeypatch)


def test_the_shares_are_of_nine_minutes() -> None:
    assert sum(one.share for one in STEPS) == 60 * gpu_report.MINUTES


@pytest.mark.parametrize(
    ("visible", "device", "chosen"),
    [("", "cuda:1", "1"), ("2,5", "cuda:1", "5"), ("2,5", "cpu", ""), ("GPU-a", "cuda:0", "GPU-a")],
)
def test_a_process_sees_its_device_alone(visible: str, device: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_report._environment(torch.device(device))["CUDA_VISIBLE_DEVICES"] == chosen
