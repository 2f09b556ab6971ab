"""An illegal access ends a worker and not the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import outside_pytest

pytestmark = pytest.mark.full
TESTS = Path(__file__).parent
LAUNCHES = """
import pytest, torch
from fake_cuda import fake_cuda
import ditfast
from ditfast import ops

@pytest.mark.parametrize("i", range(10))
def test_launch(i):
    with fake_cuda() as fake, ditfast.backend("triton"):
        if i in FAULTS:
            fake.fail_next_launch("an illegal memory access was encountered")
        ops.layer_norm_modulate(torch.ones(1, 4, 32, device="cuda"), None, None)
"""


QUOTES = """
def test_quote():
    assert "" == "another process lost its GPU: CUDA error: an illegal memory access was encountered"

def test_next():
    pass
"""


def run(folder: Path, tests: str, *options: str) -> str:
    file = folder / "test_launches.py"
    file.write_text(tests)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "cuda_errors",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        *options,
        str(file),
    ]
    environment = {**outside_pytest(), "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("faults", [{2}, set(range(9))], ids=["one", "nine"])
def test_all_other_tests_report(tmp_path: Path, faults: set[int]) -> None:
    pytest.importorskip("xdist")
    out = run(tmp_path, LAUNCHES.replace("FAULTS", str(faults)), "-n", "2")
    assert f"{len(faults)} failed, {10 - len(faults)} passed" in out, out
    assert out.count("CUDA error: an illegal memory access was encountered") >= len(faults)
    assert "crashed while running" not in out


def test_without_xdist_the_run_ends_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = run(tmp_path, LAUNCHES.replace("FAULTS", "{2}"), "-p", "no:xdist")
    assert "1 failed, 2 passed" in out, out
    assert "run with -n 1 to go on" in out


def test_an_assertion_that_quotes_an_error_ends_nothing(tmp_path: Path) -> None:
    out = run(tmp_path, QUOTES, "-p", "no:xdist")
    assert "1 failed, 1 passed" in out, out
