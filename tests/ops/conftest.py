"""Fixtures of the tests of ops."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from ditfast.ops import decisions


@pytest.fixture
def unknown_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide measurements and predictions, which this machine's GPU may have: ops take their defaults."""
    decisions.forget()
    with monkeypatch.context() as patch:
        patch.setattr(decisions, "evidence", functools.cache(lambda device: decisions.Evidence()))
        yield
        decisions.forget()
