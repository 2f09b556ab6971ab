"""Data by the name that a user gives."""

from __future__ import annotations

from pathlib import Path

from ... import vae as autoencoder
from .digits import Digits
from .images import ImageFolder
from .latents import INDEX, Latents
from .records import Data, DataError

DIGITS = "digits"


def open_data(source: str, *, image_size: int = 256, vae: autoencoder.VAE | None = None) -> Data:
    """The data that ``source`` names.

    Args:
        source: ``"digits"``; or a folder of images or of folders of them, one a class; or one of extracted latents. A folder
            called digits is ``"./digits"``.
        image_size: pixels along a side, of a folder of images.
        vae: encodes the images of a folder, on its device; latents have to be this one's.

    Raises:
        DataError: there is no such data, or it cannot be trained on.
        VAEError: the VAE cannot encode images of that size.
    """
    if source == DIGITS:
        return Digits()
    path = Path(source).expanduser()
    if not path.is_dir():
        came = "a file" if path.exists() else "nothing there"
        raise DataError(f"data: {source}: {came}, expected a folder of images or of latents, or {DIGITS}")
    return Latents(path, vae) if (path / INDEX).exists() else ImageFolder(path, image_size, vae)
