"""A folder of images as data."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import vae as autoencoder
from ...files import visible_entries
from ...image_files import NOT_READ, SUFFIXES, find_images, open_image, upright
from ...sampling.settings import digest
from .records import BadRecord, DataError, Record

_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # a channel; Pillow's modes
_ENCODED_TOGETHER = 8


class ImageFolder:
    """Images [3, size, size] 8-bit, the middle of each file's; on the device mirrored, scaled and, with a VAE, encoded.

    Folders in the folder are the classes, in the order of their names; images in folders within a class's are of that class,
    which a warning says; images that lie in the folder directly are of one class. Hidden files are left out, and what systems
    leave behind. Photographs are turned upright as their EXIF orientation says.

    Args:
        path: of the folder.
        image_size: pixels along a side.
        vae: encodes the images, of which latents are drawn; None where pixels are trained on.

    Attributes:
        names: of the files, within the folder.
        labels: of each.
        class_names: of the folders.
        latent_scale: the VAE's ``autoencoder.scaling``; None without one.
        files: a digest of their names and sizes.

    Raises:
        DataError: no images, a class without, or images beside classes; or Pillow is not installed.
        VAEError: the VAE cannot encode that size.
    """

    def __init__(self, path: Path, image_size: int, vae: autoencoder.VAE | None = None):
        _pillow()
        self.path, self.image_size, self.vae = path, image_size, vae
        try:
            found, classes = _files(path)
        except OSError as error:
            raise DataError(f"data: {error.filename}: cannot be read: {error.strerror}") from error
        self.names = [name for name, _, _ in found]
        self.labels = [label for _, label, _ in found]
        self.num_classes, self.class_names = len(classes), classes
        self.latent_scale = None if vae is None else autoencoder.scaling(vae)
        listed = hashlib.sha256()
        for name, _, size in found:
            listed.update(os.fsencode(f"{name} {size}\n"))
        self.files = listed.hexdigest()[:16]
        pixels = (3, image_size, image_size)
        self.input_shape = pixels if vae is None else autoencoder.latent_shape(vae, image_size)
        self.fingerprint = f"{len(self)} images {self.files}, {image_size} pixels"
        if vae is not None:
            self.fingerprint += f", VAE {digest(vae.state_dict())} {list(autoencoder.scaling(vae).values())}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the VAE: other processes read records, which need none."""
        return {**self.__dict__, "vae": None}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        return Record(read_image(self.path / self.names[index], self.image_size), self.labels[index])

    def clean(self, values: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        images = to_unit(values)  # [b, 3, size, size]
        images = torch.where(flips[:, None, None, None], images.flip(-1), images)  # [b, 3, size, size]
        if self.vae is None:
            return images
        moments = autoencoder.encode_moments(self.vae, images, _ENCODED_TOGETHER)  # [b, 2C, H, W]
        return autoencoder.draw_latents(moments, noise, **autoencoder.scaling(self.vae))  # [b, C, H, W]


def to_unit(pixels: Tensor) -> Tensor:
    """8-bit to fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def read_image(path: Path, size: int) -> Tensor:
    """Return the middle square of a file, upright: [3, size, size] uint8, RGB.

    It is made smaller as for ImageNet's usual reference batches: halved by averages while it is at least twice too large,
    then resized bicubically.

    Raises:
        BadRecord: it cannot be read, or has more than 8 bits a channel.
    """
    image_module = _pillow()
    try:
        with open_image(path, _FORMATS) as image:
            if image.mode not in _EIGHT_BITS:
                raise BadRecord(f"{path}: {image.mode} pixels, expected 8 bits a channel")
            square = _middle(upright(image).convert("RGB"))
    except BadRecord:
        raise
    except Exception as error:  # of a broken file Pillow raises OSError, SyntaxError, ValueError, zlib.error, ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadRecord(f"{path}: not a readable image: {lines[0]}") from error
    factor = 1
    while square.width >= 2 * factor * size:
        factor *= 2
    pixels = square.reduce(factor).resize((size, size), image_module.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def _middle(image: Any) -> Any:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _files(path: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Return name, label and size in bytes of each image, in order; and the names of the classes."""
    classes = [entry.name for entry in visible_entries(path) if entry.is_dir()]
    every = find_images(path)
    images = [(name, entry) for name, entry in every if name.lower().endswith(SUFFIXES)]
    flat = [(name, 0, entry.stat().st_size) for name, entry in images if "/" not in name]
    if flat and classes:
        raise DataError(f"data: {path}: holds the image {flat[0][0]} beside the folder {classes[0]}, expected one or the other")
    if left_out := [name for name, _ in every if name.lower().endswith(NOT_READ)]:
        told = f"{len(left_out)} images are left out, such as {left_out[0]}"
        warnings.warn(f"data: {path}: {told}; expected {', '.join(SUFFIXES)}", stacklevel=3)
    if flat:
        return flat, [path.name]
    if not images:
        raise DataError(f"data: {path}: no images ({', '.join(SUFFIXES)}), expected some, or folders of them, one a class")
    labels = {name: label for label, name in enumerate(classes)}
    found = [(name, labels[name.partition("/")[0]], entry.stat().st_size) for name, entry in images]
    used = {label for _, label, _ in found}
    for name, label in labels.items():
        if label not in used:
            raise DataError(f"data: {path / name}: no images ({', '.join(SUFFIXES)}), expected some of this class")
    if nested := [name for name, _, _ in found if name.count("/") > 1]:
        told = f"{len(nested)} images lie in folders within a class's folder, such as {nested[0]}"
        warnings.warn(f"data: {path}: {told}; they are of that class", stacklevel=3)
    return found, classes


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("data: images are read by Pillow, which is not installed: pip install 'ditfast[train]'") from error
    return Image
