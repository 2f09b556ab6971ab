"""Image files of other programs, found in folders and read upright by Pillow, which is imported only where one is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import visible_entries

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".tif", ".tiff")
_ORIENTATION = 0x0112  # EXIF's tag of how a camera stored a photograph
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ON_THEIR_SIDE = (5, 6, 7, 8)


def find_images(folder: str | os.PathLike[str]) -> list[tuple[str, os.DirEntry[str]]]:
    """List the images in a folder and in the folders within it, by their names from there, in the order of names.

    Those whose format is ``NOT_READ`` are listed too, for the caller to name.

    Raises:
        OSError: a folder cannot be read, or a link leads nowhere.
    """
    return list(_find(Path(folder), "", ()))


def _find(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder above
        return
    for entry in visible_entries(folder):
        if entry.is_dir():
            yield from _find(Path(entry), f"{prefix}{entry.name}/", (*above, here))
        elif not entry.is_file():
            entry.stat()  # raises for a link that leads nowhere
        elif entry.name.lower().endswith((*SUFFIXES, *NOT_READ)):
            yield prefix + entry.name, entry


def open_image(path: Path, formats: tuple[str, ...]) -> Any:
    """Open a file of one of Pillow's formats as its image, for a ``with`` block; nothing but the header is read yet."""
    from PIL import Image

    return Image.open(path, formats=formats)


def upright(image: Any) -> Any:
    """Return an image as viewers show it: turned or mirrored as its EXIF orientation says."""
    from PIL import Image

    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(Image.Transpose[turn])


def upright_size(image: Any) -> tuple[int, int]:
    """Return the width and height of ``upright`` by the header alone."""
    return (image.height, image.width) if _orientation(image) in _ON_THEIR_SIDE else (image.width, image.height)


def _orientation(image: Any) -> int:
    """Return the orientation, 1 (upright) where it is missing or cannot be read."""
    from PIL import Image

    try:
        # The base class's: a PNG's own would read all pixels first.
        return Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # of a damaged EXIF block Pillow raises SyntaxError, struct.error, ValueError, ...
        return 1
