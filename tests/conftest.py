"""Devices of the tests: kernels run on the simulator, or (no C++ compiler) in the interpreter; gpu tests on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from compile_kernels import compile_ahead
from cuda_errors import pytest_configure, pytest_handlecrashitem, pytest_runtest_makereport
from support import HAS_GPU, TARGETS, WHERE, Runner

from ditfast import threads
from ditfast.dispatch.plan import forget_plans

__all__ = ["pytest_configure", "pytest_handlecrashitem", "pytest_runtest_makereport"]


def pytest_report_header() -> list[str]:
    kernels = {
        "gpu": "kernels run on a GPU",
        "simulator": "kernels run as compiled code on the simulator (tests/ptxsim)",
        "interpreter": "kernels run in Triton's interpreter, NOT as compiled code: no g++, or TRITON_INTERPRET=1",
    }[WHERE]
    return [kernels, "tests marked gpu run on " + ("the GPU" if HAS_GPU else "a fake GPU (tests/fake_cuda), in the tier full")]


def pytest_sessionstart(session: pytest.Session) -> None:
    if HAS_GPU:
        compile_ahead(session.config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.full)
            if WHERE == "interpreter":
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or g++ for a fake one"))


@pytest.fixture(autouse=True)
def _cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    """Open the fake GPU for tests marked gpu where there is no real one."""
    if request.node.get_closest_marker("gpu") and not HAS_GPU:
        from fake_cuda import fake_cuda

        with fake_cuda():
            yield
    else:
        yield


@pytest.fixture(params=[*(target for target in TARGETS if target != "gpu"), pytest.param("gpu", marks=pytest.mark.gpu)])
def compiled(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Run ops on their Triton kernels: on the simulator, as compiled for Ampere and for Hopper, and on a GPU."""
    with Runner.open(request.param) as runner:
        yield runner


@pytest.fixture(params=["torch", "triton", *(pytest.param(t, marks=pytest.mark.gpu) for t in ("gpu-torch", "gpu"))])
def either(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Run ops on plain torch, then on their kernels; both also on a GPU."""
    with Runner.open(TARGETS[0] if request.param == "triton" else request.param) as runner:
        yield runner


@pytest.fixture(autouse=True)
def _seeded(_cuda: None) -> None:
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # functions compiled in one test must not count against another's limit of recompilations


@pytest.fixture(autouse=True)
def _plain_pipes() -> None:
    """Let commands write to pipes of any width; pytest-xdist names one to its workers."""
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _fresh_plans() -> Iterator[None]:
    """Let ops select anew, and forget what they selected while a test had patched something."""
    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny models."""
    with threads.one_thread():
        yield
