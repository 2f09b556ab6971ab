"""Fixtures; a conftest.py takes them by importing them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from .fake import FakeCuda, fake_cuda, installed


@pytest.fixture
def fake_gpu() -> Iterator[FakeCuda]:
    """One fake H200, in the place of a fake that the process has; a test of it is skipped on a real GPU."""
    outer = installed()
    if outer is None and torch.cuda.is_available():
        pytest.skip("needs a fake GPU, and there is a real one")
    if outer is not None:
        outer.uninstall()
    try:
        with fake_cuda() as fake:
            yield fake
    finally:
        if outer is not None:
            outer.install()


def cut_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benches measure a GPU's peaks on matrices that a CPU multiplies in no time."""
    from ditfast.benchmarks import gauges

    small = functools.partial(gauges.measure_ceilings, largest_copy=4096, largest_side=64)
    monkeypatch.setattr(gauges, "measure_ceilings", small)
