"""`pytest -m gpu` compiles its kernels before the first test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import environment
from support import WHERE, outside_pytest

pytestmark = [pytest.mark.full, pytest.mark.skipif(WHERE != "simulator", reason="needs g++ for a fake GPU")]
ROOT = Path(__file__).parents[1]
COUNT = """
import triton
misses = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: cache_hit or misses.append(1)
def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"compiled since: {len(misses)}")
"""


def test_tests_find_their_kernels_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "count_misses.py").write_text(COUNT)
    variables = {**outside_pytest(), **environment(), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    variables["PYTHONPATH"] += os.pathsep + str(tmp_path)
    chosen = ["-m", "gpu", "tests/ops/test_layer_norm_modulate.py", "-k", "test_kernel_gradients and D384"]
    command = [sys.executable, "-m", "pytest", "-p", "count_misses", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    found = re.search(r"kernels: (\d+), compiled in (\d+) s.*passed.*compiled since: (\d+)", done.stdout, re.DOTALL)
    assert found, done.stdout + done.stderr
    kernels, _, later = map(int, found.groups())
    assert kernels >= 6  # forward and backward in three dtypes
    assert later == 0
