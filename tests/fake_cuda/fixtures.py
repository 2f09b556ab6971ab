"""Fixtures; a conftest.py takes them by importing them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .fake import FakeCuda, fake_cuda


@pytest.fixture
def fake_gpu() -> Iterator[FakeCuda]:
    """One fake H200."""
    with fake_cuda() as fake:
        yield fake
