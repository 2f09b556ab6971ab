"""Compiles the kernels that tests launch into Triton's cache, on every core, and says how many there are.

    python tests/compile_kernels.py -m gpu

takes pytest's arguments and needs no GPU; with one, ``pytest -m gpu`` does this before its first test. This file is also a
plugin of the pytest that it starts: there a launch compiles its kernel and runs nothing. That process runs without assert
statements (``python -O``), so that a test goes on to its last launch, whatever numbers it finds.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

_seconds: dict[str, float] = {}  # CPU time of each kernel's compilation, by Triton's hash; next to none for one in its cache
_start = time.perf_counter()


def compile_kernels(arguments: Sequence[str]) -> int:
    """Compile what the tests that pytest chooses by these arguments launch, and return pytest's exit status."""
    command = [sys.executable, "-O", "-m", "pytest", "--assert=plain", "-q", "-p", "compile_kernels", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["--dist=worksteal", f"--numprocesses={os.cpu_count() or 1}"]
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    return subprocess.run([*command, *arguments], env=environment, check=False).returncode


def compile_ahead(config: pytest.Config) -> None:
    """Compile what ``pytest -m gpu`` is about to launch; workers of xdist compile in parallel as they go."""
    option = config.option
    if option.markexpr != "gpu" or option.collectonly or getattr(option, "numprocesses", None):
        return
    if "PYTEST_XDIST_WORKER" in os.environ or config.pluginmanager.has_plugin("compile_kernels"):
        return
    chosen = ["-m", option.markexpr, "-k", option.keyword, "-c", str(config.inipath), "--rootdir", str(config.rootpath)]
    compile_kernels([*chosen, *config.args])


# ------------------------------------------------------------------------------------------------ the plugin
def pytest_configure() -> None:
    from triton.runtime.jit import JITFunction

    JITFunction.run = functools.partialmethod(_compile, JITFunction.run)


def _compile(function: Any, run: Any, *args: Any, warmup: bool, **options: Any) -> None:
    start = _cpu_seconds()
    kernel = run(function, *args, warmup=True, **options)
    _seconds.setdefault(kernel.hash, _cpu_seconds() - start)


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those it has waited for, as it does for ptxas."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Let no test fail for numbers that nothing has computed."""
    try:
        yield
    except (Exception, pytest.fail.Exception):
        return


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["seconds"] = _seconds


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for kernel, seconds in getattr(node, "workeroutput", {}).get("seconds", {}).items():
        _seconds[kernel] = max(seconds, _seconds.get(kernel, 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds = time.perf_counter() - _start
    total = f"kernels: {len(_seconds)}, compiled in {sum(_seconds.values()):.0f} s of CPU time"
    terminalreporter.write_line(f"{total}, next to none for those in Triton's cache; {seconds:.0f} s in all")


if __name__ == "__main__":
    raise SystemExit(compile_kernels(sys.argv[1:]))
