"""Processes that have the fake CUDA from their start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from fake_cuda import environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU, or a process that has the fake")


def run_with_fake(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment(count=2)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_of_its_own() -> None:
    assert run_with_fake("import torch; print(torch.ones(2, device='cuda:1').sum().item())") == "2.0"


def test_a_process_without_torch_pays_nothing() -> None:
    assert run_with_fake("import sys, json; print(sorted({'torch', 'fake_cuda', 'triton'} & set(sys.modules)))") == "[]"


def test_forked_processes_cannot_use_it() -> None:
    code = """
import os, sys, torch
torch.zeros(1, device="cuda")
child = os.fork()
if child == 0:
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        os._exit(7 if "Cannot re-initialize CUDA in forked subprocess" in str(error) else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_with_fake(code) == "7"
