"""benchmarks/gpu.sh: a dry run of all of it from a bare clone; its steps as stand-ins that fail and hang; its summary."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from environments import make_environment
from support import outside_pytest

from ditfast.benchmarks import gpu_first

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu.sh"
STEPS = ["install", "doctor", "forward", "tests", "compiler32", "compiler1", "micro", "host", "compile", "kernels", "training"]
RESULTS = [
    "summary.txt",
    "logs.txt",
    "facts.jsonl",
    "tests.jsonl",
    "forward.json",
    "host.json",
    "compile.json",
    "kernels.json",
    "training.json",
]
ROWS = {"kernels.json": "benchmarks"}  # pytest-benchmark's name of them

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils' timeout")

# An interpreter for gpu.sh: it notes each call in $CALLS, then does what $FAULT says for the step that $STEP names.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *find_spec*) exit "${NO_TORCH:-0}" ;;
  *is_available*) exit "${NO_GPU:-0}" ;;
  "-m pip list"*) exit 0 ;;
  "-m pip"*) name=install ;;
  "-m ditfast doctor") name=doctor ;;
  "-m pytest"*kernels.py*) name=kernels ;;
  "-m pytest"*) name=tests ;;
  *"bench --"*"/forward "*) name=forward ;;
  *"bench --"*"/compile "*) name=compile ;;
  *"bench --"*"/compiler"*) name=compiler ;;
  *"benchmarks.host "*) name=host ;;
  *training*) name=training ;;
  *micro) name=micro ;;
  *summary) name=summary ;;
esac
echo "$name PYTHONPATH=$PYTHONPATH $*" >> "$CALLS"
if [[ $name == "${STEP:-}" ]]; then eval "$FAULT"; fi
"""
HANG = 'trap "" INT; sleep 300 & echo $! > "$CALLS.child"; echo begun; wait; wait'


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for Python, of which gpu.sh's environment knows; results go to its ``out``."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    for name in ("PYTHON", "PYTHONPATH", "DRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("MINUTES", "2")
    return tmp_path


def run_script(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT)]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def statuses(folder: Path) -> dict[str, int]:
    lines = (folder / "out/summary.txt").read_text().splitlines()
    return {match[1]: int(match[2]) for line in lines if (match := re.match(r"(\w+): status (\d+), \d+ of \d+ s", line))}


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def child_of(folder: Path) -> int:
    return int((folder / "calls.child").read_text())


# ------------------------------------------------------------------------------------------------ the whole of it
@pytest.mark.full
def test_a_dry_run_from_a_bare_clone_without_a_network_runs_every_step(tmp_path: Path) -> None:
    clone, python = tmp_path / "clone", tmp_path / "venv/bin/python3"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    make_environment(tmp_path / "venv")
    minutes = 8 * (2 if "PYTEST_XDIST_WORKER" in os.environ else 1)  # where other workers' tests share the cores
    variables = {**CLOSED_PROXIES, "DRY": "1", "MINUTES": str(minutes), "OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    done = subprocess.run(
        [*without_network(), "bash", "benchmarks/gpu.sh"],
        cwd=clone,
        env={**outside_pytest(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * minutes + 120,
    )
    logs = (tmp_path / "out/logs.txt").read_text()
    assert done.returncode == 0, done.stdout + logs[-4000:]
    assert statuses(tmp_path) == dict.fromkeys([step for step in STEPS if step != "compiler32"], 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(RESULTS)
    for name in RESULTS:
        path = tmp_path / "out" / name
        if path.suffix == ".json":
            assert json.loads(path.read_text())[ROWS.get(name, "rows")], name
        else:
            assert path.read_text().strip(), name
    facts = [json.loads(line) for line in (tmp_path / "out/facts.jsonl").read_text().splitlines()]
    measured = {fact["measured"] for fact in facts if "failed" not in fact}
    assert measured == {"machine", "host time", "attention"}
    outcomes = [json.loads(line)["outcome"] for line in (tmp_path / "out/tests.jsonl").read_text().splitlines()]
    assert set(outcomes) <= {"passed", "skipped"}
    assert "passed" in outcomes


CLOSED_PROXIES = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


def without_network() -> list[str]:
    """Return what to put before a command that shall have no network; where it is not permitted, proxies must do."""
    command = ["unshare", "--net", "--map-root-user"]
    permitted = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if permitted else []


# ------------------------------------------------------------------------------------------------ steps
def test_every_step_runs_once_in_order(script: Path) -> None:
    done = run_script(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(script) == dict.fromkeys(STEPS, 0)
    calls = [line.split()[0] for line in (script / "calls").read_text().splitlines()]
    assert sorted(calls) == sorted([*(re.sub(r"\d", "", step) for step in STEPS), "summary"])
    assert calls[:3] == ["install", "doctor", "forward"]
    assert calls[-6:] == ["micro", "host", "compile", "kernels", "training", "summary"]
    assert list(Path(script).glob("out/*.log")) == []


def test_tests_run_on_most_cores_however_many_threads_a_process_has(script: Path) -> None:
    nproc = script / "bin/nproc"
    nproc.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-14}"\n')  # coreutils' own obeys the variable too
    nproc.chmod(0o755)
    assert run_script(script, OMP_NUM_THREADS="3").returncode == 0
    assert re.search(r"^tests .* -n 10 ", (script / "calls").read_text(), re.MULTILINE)


def test_a_step_that_fails_costs_itself_only(script: Path) -> None:
    done = run_script(script, STEP="doctor", FAULT="echo no parity; exit 3")
    assert done.returncode == 1
    assert statuses(script) == {**dict.fromkeys(STEPS, 0), "doctor": 3}
    assert "no parity" in (script / "out/logs.txt").read_text()


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_step_that_hangs_is_ended_with_all_it_started(script: Path) -> None:
    done = run_script(script, STEP="doctor", FAULT=HANG)
    assert done.returncode == 1
    assert statuses(script) == {**dict.fromkeys(STEPS, 0), "doctor": 137}
    assert re.search(r"doctor: status 137, \d+ of \d+ s \(its time was up\)", done.stdout)
    assert done.stderr == ""
    assert not is_running(child_of(script))


def test_a_step_that_is_stopped_for_a_while_goes_on(script: Path) -> None:
    done = run_script(
        script, STEP="doctor", FAULT='setsid bash -c "sleep 1; kill -CONT -- -$PPID" & sleep 0.5; kill -STOP 0; exit 7'
    )
    assert statuses(script) == {**dict.fromkeys(STEPS, 0), "doctor": 7}
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_what_a_step_leaves_behind_is_ended(script: Path) -> None:
    done = run_script(script, STEP="doctor", FAULT='sleep 300 & echo $! > "$CALLS.child"')
    assert done.returncode == 0
    assert not is_running(child_of(script))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupt_ends_what_runs(script: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "MINUTES": "30", "STEP": "micro", "FAULT": HANG}
    process = subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever starts this run in the background ignores interrupts, and bash cannot trap what was ignored before it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (script / "calls.child").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "interrupted: the other steps are missing"
    assert "micro" not in statuses(script)
    assert not is_running(child_of(script))


def test_a_step_without_time_is_skipped(script: Path) -> None:
    done = run_script(script, MINUTES="1")
    assert done.returncode == 1
    assert done.stdout.startswith("install: skipped, no time is left\n")
    assert statuses(script) == dict.fromkeys(STEPS[1:], 0)


def test_results_of_earlier_runs_are_kept(script: Path) -> None:
    (script / "out/earlier-1").mkdir(parents=True)
    for name in [*RESULTS, "notes.txt"]:
        (script / "out" / name).write_text("old")
    assert run_script(script).returncode == 0
    assert {path.name for path in (script / "out").iterdir()} == {
        "summary.txt",
        "logs.txt",
        "notes.txt",
        "earlier-1",
        "earlier-2",
    }
    assert {path.name: path.read_text() for path in (script / "out/earlier-2").iterdir()} == dict.fromkeys(RESULTS, "old")
    assert "old" not in (script / "out/summary.txt").read_text() + (script / "out/logs.txt").read_text()


def test_rows_of_a_bench_that_fails_are_kept(script: Path) -> None:
    fault = 'all="$*"; folder=${all#*--out }; folder=${folder%% *}; mkdir "$folder"; echo rows > "$folder/bench.json"; exit 4'
    run_script(script, STEP="forward", FAULT=fault)
    assert statuses(script)["forward"] == 4
    assert (script / "out/forward.json").read_text() == "rows\n"


def test_without_pip_a_copy_of_the_package_is_on_the_path(script: Path) -> None:
    code = "import ditfast.kernels, ditfast.benchmarks.gpu_first; print('from', ditfast.__file__)"
    done = run_script(script, STEP="install", FAULT="exit 1")
    assert done.returncode == 1
    assert statuses(script) == {**dict.fromkeys(STEPS, 0), "install": 1}
    install, *others = (script / "calls").read_text().splitlines()
    assert "/copy" not in install
    assert all(re.search(r"PYTHONPATH=\S+/copy:", line) for line in others)
    done = run_script(script, STEP="install", FAULT="exit 1", PYTHON=with_real_doctor(script, code), MINUTES="9")
    assert re.search(r"^from \S+/copy/ditfast/__init__.py$", (script / "out/logs.txt").read_text(), re.MULTILINE)
    assert statuses(script)["doctor"] == 0


def with_real_doctor(folder: Path, code: str) -> str:
    """Return a stand-in whose doctor is code for the Python of this process."""
    python = folder / "bin" / "mixed"
    python.write_text(
        PYTHON.replace('"-m ditfast doctor") name=doctor', f'"-m ditfast doctor") exec {sys.executable} -c "{code}"')
    )
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"MINUTES": "soon"}, "MINUTES: got 'soon', expected a whole number from 1 to 999"),
        ({"MINUTES": "0"}, "MINUTES: got '0', expected a whole number from 1 to 999"),
        ({"OUT": "/dev/null/out"}, "OUT: got /dev/null/out, expected a folder that can be written"),
        ({"NO_TORCH": "1", "PYTHON": "python3"}, "found no Python that has torch: activate an environment"),
        ({"NO_GPU": "1"}, "torch sees no GPU: look at nvidia-smi, or run with DRY=1"),
    ],
    ids=["minutes-word", "minutes-zero", "out", "torch", "gpu"],
)
def test_bad_input_is_one_line(script: Path, environment: dict[str, str], line: str) -> None:
    done = run_script(script, **environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"gpu.sh: {line}")
    assert not (script / "calls").exists()


# ------------------------------------------------------------------------------------------------ summary
@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_first, "OUT", tmp_path)
    return tmp_path


def test_a_summary_of_nothing_says_that_no_test_ran(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_first.main(["summary"]) == 0
    assert capsys.readouterr().out == "tests    none ran\n"


def test_a_summary_has_what_broken_files_still_hold(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("forward.json", "kernels.json"):
        (out / name).write_text('{"rows": [{"mod')
    (out / "training.json").write_text('["of another kind"]')
    (out / "facts.jsonl").write_text('{"measured": "host time", "host_us": 5.5}\n{"measured": "att')
    failure = {"outcome": "failed", "seconds": 1, "reason": "CUDA error"}
    failures = [json.dumps({"test": f"tests/ops/test_mlp.py::test_kernel[{i}]", **failure}) for i in range(3)]
    (out / "tests.jsonl").write_text(
        "\n".join([json.dumps({"test": "a::b", "outcome": "passed", "seconds": 1, "reason": ""}), *failures])
    )
    assert gpu_first.main(["summary"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fact     measured host time, host_us 5.5",
        "tests    1 passed, 3 failed",
        "  3 x tests/ops/test_mlp.py: CUDA error",
    ]


def test_a_measurement_that_fails_leaves_its_reason(out: Path) -> None:
    def fail() -> dict[str, float]:
        raise RuntimeError("No available kernel.\nAborting.")

    gpu_first.record_fact({"measured": "attention", "backend": "flash"}, fail)
    assert json.loads((out / "facts.jsonl").read_text()) == {
        "measured": "attention",
        "backend": "flash",
        "failed": "RuntimeError: No available kernel.",
    }


def test_outcomes_are_written_as_they_come(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="AssertionError: off by 2\nassert 2 == 1"))
    for when, outcome, reason in [
        ("setup", "passed", None),
        ("call", "passed", None),
        ("call", "failed", crash),
        ("???", "failed", "worker 'gw0' crashed while running 'test_a'"),
    ]:
        about = {"nodeid": "test_a", "when": when, "outcome": outcome, "passed": outcome == "passed"}
        gpu_first.pytest_runtest_logreport(SimpleNamespace(**about, longrepr=reason, duration=0.123))
    outcomes = [json.loads(line) for line in (out / "tests.jsonl").read_text().splitlines()]
    assert [(entry["outcome"], entry["reason"]) for entry in outcomes] == [
        ("passed", ""),
        ("failed", "AssertionError: off by 2"),
        ("failed", "worker 'gw0' crashed while running 'test_a'"),
    ]
