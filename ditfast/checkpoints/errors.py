"""One error for everything that can be wrong with a checkpoint, on one line."""

from __future__ import annotations

from collections.abc import Sequence

MOST_LISTED = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, saved or converted: which one, what was found, what was expected."""


def listed(items: Sequence[str]) -> str:
    """``a, b and 3 more``, on one line and without control characters, whatever a file calls its tensors."""
    shown = [item if item.isprintable() else ascii(item) for item in items[:MOST_LISTED]]
    more = len(items) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def one_line(message: str) -> str:
    """The first line of a message that somebody else wrote."""
    return next(iter(message.strip().splitlines()), "no reason given")
