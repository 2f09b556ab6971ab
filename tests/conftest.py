"""Where the kernel tests run: on a GPU, else as compiled code on the simulator, else (no C++ compiler) in the interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from support import TARGETS, WHERE, Runner

from ditfast import threads


def pytest_report_header() -> str:
    return {
        "gpu": "kernels run on a GPU",
        "simulator": "kernels run as compiled code on the simulator (tests/ptxsim): no GPU here",
        "interpreter": "kernels run in Triton's interpreter, NOT as compiled code: no GPU, and no g++ or TRITON_INTERPRET=1",
    }[WHERE]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if runs_kernels(item) and WHERE == "gpu" and not is_slow(item):
            item.add_marker(pytest.mark.gpu)  # `pytest -m gpu` there is all that a GPU can be wrong about
        if item.get_closest_marker("gpu") and WHERE != "gpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    # Compiling is what these tests spend their time on: the newer target takes all chosen cases, the older one a sample.
    older = [item for item in items if target_of(item) == "sm_80" and item.name.startswith("test_kernel") and not is_slow(item)]
    del older[::4]
    for item in older:
        item.add_marker(pytest.mark.slow)


def runs_kernels(item: pytest.Item) -> bool:
    return getattr(getattr(item, "module", None), "Runner", None) is Runner


def target_of(item: pytest.Item) -> str | None:
    return item.callspec.params.get("compiled") if hasattr(item, "callspec") else None


def is_slow(item: pytest.Item) -> bool:
    return "slow" in item.keywords


@pytest.fixture(params=TARGETS)
def compiled(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Runs ops on their Triton kernels: twice on the simulator, as compiled for Ampere and for Hopper."""
    with Runner.open(request.param) as runner:
        yield runner


@pytest.fixture(params=["torch", "triton"])
def either(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Runs ops on plain torch, then on their kernels."""
    with Runner.open("torch" if request.param == "torch" else TARGETS[0]) as runner:
        yield runner


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # functions compiled in one test must not count against another's limit of recompilations


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny models."""
    with threads.one_thread():
        yield
