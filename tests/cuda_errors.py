"""A pytest plugin: an illegal access ends its process, in which no CUDA call works anymore, and not the run.

Under xdist the worker ends, its test is reported as failed with the error, and a new worker takes the tests that are left.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest

STICKY = ("CUDA error", "HIP error", "Triton Error [CUDA]: an illegal")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "maxworkerrestart", "no xdist") is None:
        config.option.maxworkerrestart = "10000"  # xdist would give up after a few


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is None:
        return
    error = call.excinfo.value
    # An assertion may quote what another process printed.
    if not isinstance(error, RuntimeError) or not any(words in str(error) for words in STICKY):
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        _message(os.environ["PYTEST_XDIST_TESTRUNUID"], item.nodeid).write_text(str(item.repr_failure(call.excinfo)))
        os._exit(3)
    item.session.shouldstop = f"CUDA error in {item.nodeid}: no CUDA call works in this process anymore; run with -n 1 to go on"


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """Report the error that a worker left, instead of its end."""
    message = _message(report.node.workerinput["testrunuid"], crashitem)  # type: ignore[attr-defined]
    if message.exists():
        report.longrepr = message.read_text()
        message.unlink()


def _message(run: str, nodeid: str) -> Path:
    name = hashlib.sha256(f"{run} {nodeid}".encode()).hexdigest()[:20]
    return Path(tempfile.gettempdir()) / f"cuda-error-{name}.txt"
