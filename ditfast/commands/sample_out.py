"""Where the images of ``ditfast sample`` go: one grid, or a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..images import Pixels, from_pixels, labelled_grid, load_png, save_npz, save_png
from ..interrupt import keeping
from ..sampling.folder import ImageFolder, RunStopped
from ..sampling.painter import Painter
from ..sampling.ranks import Ranks
from ..terminal import say
from .progress import image_progress

GRID = "grid.png"
NPZ = "samples.npz"
MOST_IN_GRID = 400
_CELL = 32  # smaller images are enlarged to this in a grid


def draw_grid(path: Path, painter: Painter, classes: Sequence[int], per_class: int, batch: int) -> None:
    """A row for each class, in one file.

    Raises:
        RunStopped: the file cannot be written.
    """
    num = len(classes) * per_class
    parts = []
    with keeping(lambda: f"{path} was not written"), image_progress("sampling", num, Ranks()) as advance:
        for start in range(0, num, batch):
            block = range(start, min(start + batch, num))
            parts.append(painter.paint(block, advance))
    try:
        save_png(path, _grid(np.concatenate(parts), classes, per_class))
    except OSError as error:
        raise RunStopped(f"{path}: {error.strerror or error}") from error


def fill_folder(
    path: Path,
    painter: Painter,
    num: int,
    batch: int,
    ranks: Ranks,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    grid: tuple[Sequence[int], int] | None,
    npz: bool,
) -> None:
    """This rank's images; when all ranks have theirs, the first adds what is made of all images.

    Args:
        settings: that decide the bytes.
        about: for the reader.
        grid: classes, and images of each; None where the images are in no such order.
        npz: also all images in one file.
    """
    folder = ImageFolder(path, num, batch)
    height, width, channels = painter.image_shape
    npz_bytes = num * height * width * 3 if npz and not (path / NPZ).exists() else 0
    folder.claim(settings, about, height * width * channels, npz_bytes)
    missing = len(folder.missing())
    if ranks.rank == 0 and 0 < missing < num:
        say(f"{path}: {num - missing} of {num} images are there already")
    with keeping(lambda: _kept(folder, num)), ranks.joined() as barrier:
        blocks = folder.unfinished(ranks)
        with image_progress("sampling", sum(map(len, blocks)), ranks) as advance:
            folder.fill(blocks, lambda block: painter.paint(block, advance))
        barrier()
        if ranks.rank == 0:
            _finish(folder, painter, num, grid, npz)


def _kept(folder: ImageFolder, num: int) -> str:
    missing = len(folder.missing())
    return f"{folder.path}: {num - missing} of {num} images are there; the same command makes the rest"


def _finish(folder: ImageFolder, painter: Painter, num: int, grid: tuple[Sequence[int], int] | None, npz: bool) -> None:
    if missing := folder.missing():
        raise RunStopped(f"{folder.path}: {len(missing)} images have gone meanwhile; the same command makes them again")

    def images() -> Iterator[Pixels]:
        return (load_png(folder.file(number)) for number in range(num))

    if grid is not None and num <= MOST_IN_GRID:
        folder.write_once(GRID, lambda path: save_png(path, _grid(np.stack(list(images())), *grid)))
    if npz:
        labels = [painter.label(number) for number in range(num)]
        folder.write_once(NPZ, lambda path: save_npz(path, images(), labels))
    folder.tidy()


def _grid(pixels: Pixels, classes: Sequence[int], per_class: int) -> Pixels:
    """[height, width, C] of [N, H, W, C], class after class."""
    rows = dict(zip(classes, from_pixels(pixels).split(per_class), strict=True))
    return labelled_grid(rows, scale=max(1, _CELL // pixels.shape[1]))
