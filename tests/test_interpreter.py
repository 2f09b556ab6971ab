"""A second opinion on a few kernel cases: the same tests, in Triton's interpreter instead of as compiled code."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import WHERE

CASES = "test_kernel and (D384-T17-bf16 or K384-T17-bf16 or D200-T16-fp32)"


def versions(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.skipif(WHERE == "interpreter", reason="the whole suite runs in the interpreter already")
def test_interpreter_agrees() -> None:
    if versions("triton") < (3, 7) and versions("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "slow or not slow",
        "-k",
        CASES,
        "tests/ops",
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
