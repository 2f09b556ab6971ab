"""Tables that are written into guides."""

from __future__ import annotations

from collections.abc import Iterator


def head(*columns: str) -> Iterator[str]:
    yield row(*columns)
    yield "|---" * len(columns) + "|"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
