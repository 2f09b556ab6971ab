"""Results of ``ditfast.sample``: latents, and the images that they decode to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import vae as autoencoder
from ..argument_checks import as_int, check_type
from ..images import Pixels, png_bytes, save_npz, save_png, tile
from .painter import decode_pixels

_CELL = 32  # smaller images are enlarged to this in a grid
_OTHER_SUFFIXES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_MOST_LABELS = 8  # in a repr


class Samples:
    """Images of a run, decoded when they are asked for; a notebook shows them as a grid.

    Attributes:
        latents: [N, C, H, W] fp32 on the model's device; of a model that makes pixels they are in about [-1, 1].
        labels: [N] int64.
        settings: what the run was told, and what it chose itself.
    """

    def __init__(
        self,
        latents: Tensor,
        labels: Tensor,
        settings: Mapping[str, Any],
        vae: autoencoder.VAE | str | Path | None = None,
        fit_vae: Callable[[autoencoder.VAE], autoencoder.VAE] = lambda vae: vae,
    ):
        """Keep the results of a run.

        Args:
            latents: as the attribute, as are ``labels`` and ``settings``.
            vae: decodes the latents, an ``AutoencoderKL`` or what ``load_vae`` takes; None where they are pixels.
            fit_vae: checks one that is loaded when images are asked for, and gives it the latents' scale.
        """
        self.latents, self.labels, self.settings = latents, labels, dict(settings)
        self._vae, self._fit_vae = vae, fit_vae

    @cached_property
    def images(self) -> Pixels:
        """[N, H, W, 3] uint8; a grey image has three equal channels.

        Raises:
            VAEError: the VAE cannot be loaded.
            FloatingPointError: an image came out infinite or NaN.
        """
        vae = self._vae
        if isinstance(vae, (str, Path)):
            vae = self._fit_vae(autoencoder.load_vae(vae).to(self.latents.device))
        pixels = decode_pixels(self.latents, vae, range(len(self)))
        return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels

    def grid(self, columns: int | None = None) -> Pixels:
        """Return all images side by side, [height, width, 3] uint8.

        Args:
            columns: images in a row; about as many as rows unless given.
        """
        if not len(self):
            raise ValueError("labels: got none, so there are no images for a grid")
        columns = math.ceil(math.sqrt(len(self))) if columns is None else as_int("columns", columns, 1)
        return tile(self.images, columns, scale=max(1, _CELL // self.images.shape[1]))

    def save(self, path: str | Path) -> None:
        """Write the images.

        Args:
            path: a name that ends in ``.png`` gets one grid, one in ``.npz`` the arrays that ADM's evaluation reads;
                anything else is a folder for ``000000.png``, ``000001.png`` and so on, which is made if it is missing.
        """
        check_type("path", path, (str, Path), "a folder, or a name that ends in .png or .npz")
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in _OTHER_SUFFIXES:
            raise ValueError(f"path: got {str(path)!r}, expected a folder, or a name that ends in .png or .npz")
        if suffix == ".png":
            save_png(path, self.grid())
        elif suffix == ".npz":
            save_npz(path, self.images, self.labels.tolist())
        else:
            path.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(self.images):
                save_png(path / f"{i:06d}.png", image)

    def __len__(self) -> int:
        return len(self.latents)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.latents.shape[1:]))
        labels = self.labels[:_MOST_LABELS].tolist()
        written = f"[{', '.join(map(str, labels))}{', ...' if len(self) > _MOST_LABELS else ''}]"
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)
        return f"Samples({len(self)} latents of {shape}, labels={written}, {settings})"

    def _repr_png_(self) -> bytes | None:
        """Return the grid for a notebook; None where a VAE would first have to be loaded."""
        loaded = "images" in vars(self) or not isinstance(self._vae, (str, Path))
        return png_bytes(self.grid()) if loaded and len(self) else None
