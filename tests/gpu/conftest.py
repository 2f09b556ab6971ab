"""Every body runs on a CPU and on a GPU, or on a fake one where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from devices import Cpu, Gpu, Place
from fake_cuda.fixtures import fake_gpu

from ditfast import threads

__all__ = ["fake_gpu"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with threads.one_thread():
        if request.param == "cuda" and not torch.cuda.is_available():
            request.getfixturevalue("fake_gpu")
        yield Cpu() if request.param == "cpu" else Gpu()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Torch's own products and sums in a fixed order, as far as it has such ones; what it lacks is a warning."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
