"""One error for everything that can be wrong with what is to be evaluated, on one line."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Images that cannot be read or compared, or a missing library or file: which one, what came, what was expected."""


def one_line(error: Exception) -> str:
    """What somebody else's error says, on one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
