"""Fixtures of the tests of ops."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from ditfast.dispatch import selection


@pytest.fixture
def unknown_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide measurements, which this machine's GPU may have: ops take their defaults."""
    selection.forget()
    with monkeypatch.context() as patch:
        patch.setattr(selection, "measured", functools.cache(lambda device: {}))
        yield
        selection.forget()
