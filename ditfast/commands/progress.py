"""Progress of images: how many, how many a second, how long still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..sampling.ranks import Ranks
from ..terminal import track_progress


@contextmanager
def image_progress(doing: str, images: int, ranks: Ranks) -> Iterator[Callable[[float], None]]:
    """Give what advances it, by images or parts of one; the first rank shows its share, and all ranks' speed."""
    description = doing if ranks.world == 1 else f"{doing}, rank 0 of {ranks.world}"
    with track_progress(description, images, "images", ranks=ranks.world, quiet=ranks.rank > 0) as progress:
        yield progress.advance
