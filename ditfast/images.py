"""Images as files: PNG, a grid of samples with its classes beside it, many in one ``.npz``. Needs torch and numpy only."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .argument_checks import as_int, as_list, as_path, check_tensor, check_type, describe, wrong_type
from .files import whole_file

Pixels = NDArray[np.uint8]
_BACKGROUND = 32  # grey of a grid

# 3x5 glyphs, a row of bits each.
_GLYPHS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}


def to_pixels(images: Tensor) -> Pixels:
    """Return [N, C, H, W] in [-1, 1] as [N, H, W, C] 8-bit, rounded; C is 1 (grey) or 3 (RGB)."""
    check_tensor("images", images, "[N, C, H, W] in [-1, 1]")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected [N, C, H, W] with 1 or 3 channels")
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def from_pixels(pixels: Pixels) -> Tensor:
    """Return [N, H, W, C] 8-bit as [N, C, H, W] fp32 in [-1, 1]."""
    _check_pixels("pixels", pixels, "[N, H, W, C]")
    return torch.tensor(pixels, dtype=torch.float32, device="cpu").permute(0, 3, 1, 2) / 127.5 - 1


def labelled_grid(rows: Mapping[int, Tensor], scale: int = 4, gap: int = 2) -> Pixels:
    """Draw one row of images for each class, its number at the left: [height, width, C] 8-bit.

    Args:
        rows: class -> [N, C, H, W] in [-1, 1]; every class with the same N.
        scale: pixels of the grid for each pixel of an image.
        gap: pixels between cells.
    """
    check_type("rows", rows, Mapping, "images [N, C, H, W] of each class")
    if len({tuple(images.shape) for images in rows.values() if isinstance(images, Tensor)}) != 1:
        raise ValueError(f"rows: got {describe(dict(rows))}, expected images of one shape, of one class or more")
    for label in rows:
        as_int("rows", label, 0)
    scale, gap = as_int("scale", scale, 1), as_int("gap", gap, 0)
    cells = np.concatenate([to_pixels(images) for images in rows.values()]).repeat(scale, axis=1).repeat(scale, axis=2)
    height = cells.shape[1]
    numbers = [_number(label, height // 8 or 1) for label in rows]
    line = max(height, *(len(number) for number in numbers))
    cells = np.pad(cells, ((0, 0), (0, line - height), (0, 0), (0, 0)), constant_values=_BACKGROUND)
    images = tile(cells, len(cells) // len(rows), gap=gap)
    margin = max(number.shape[1] for number in numbers) + gap
    grid = np.pad(images, ((0, 0), (margin, 0), (0, 0)), constant_values=_BACKGROUND)
    for i, number in enumerate(numbers):
        top = gap + i * (line + gap) + (line - len(number)) // 2
        grid[top : top + len(number), gap : gap + number.shape[1]] = number[..., None]
    return grid


def tile(pixels: Pixels, columns: int, scale: int = 1, gap: int = 2) -> Pixels:
    """Return N >= 1 images [N, H, W, C] side by side, so many in a row, each pixel ``scale`` wide: [height, width, C] 8-bit."""
    cells = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = cells.shape
    rows = -(-count // columns)
    grid = np.full((gap + rows * (height + gap), gap + columns * (width + gap), channels), _BACKGROUND, np.uint8)
    for i, cell in enumerate(cells):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = cell
    return grid


def save_png(path: str | os.PathLike[str], pixels: Pixels) -> None:
    """Write [height, width, C] 8-bit pixels, C = 1 or 3; the file appears whole or not at all."""
    path = as_path("path", path)
    content = png_bytes(pixels)
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def png_bytes(pixels: Pixels) -> bytes:
    """Return the content of a PNG file that holds [height, width, C] 8-bit pixels, C = 1 or 3."""
    _check_pixels("pixels", pixels, "[height, width, C]")
    height, width, channels = pixels.shape
    scanlines = np.zeros((height, 1 + width * channels), np.uint8)  # each line begins with its filter: 0, none
    scanlines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(scanlines.tobytes(), 9)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + tag + d + struct.pack(">I", zlib.crc32(tag + d)) for tag, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def load_png(path: str | os.PathLike[str]) -> Pixels:
    """Read a file that ``save_png`` wrote: [height, width, C] 8-bit.

    Raises:
        ValueError: somebody else's PNG, or a damaged one.
    """
    content = as_path("path", path).read_bytes()
    try:
        width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
        length, tag = struct.unpack(">I4s", content[33:41])
        lines = np.frombuffer(zlib.decompress(content[41 : 41 + length]), np.uint8).reshape(height, -1)
        pixels = lines[:, 1:].reshape(height, width, {0: 1, 2: 3}[colour])
    except (struct.error, zlib.error, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a PNG that save_png wrote, or a damaged one") from error
    if depth != 8 or tag != b"IDAT" or lines[:, 0].any():
        raise ValueError(f"{path}: not a PNG that save_png wrote")
    return pixels


def save_npz(path: str | os.PathLike[str], images: Iterable[Pixels], labels: Sequence[int] | Tensor) -> None:
    """Write ``arr_0`` [N, height, width, 3] 8-bit and ``arr_1`` [N] int64, as ADM's evaluation reads them.

    The images are taken one at a time, and the same ones make the same bytes; the file appears whole or not at all.

    Args:
        path: of the file.
        images: N times [height, width, C] 8-bit, N >= 1, all of one size; grey (C = 1) becomes three equal channels.
        labels: of each.

    Raises:
        ValueError: images of different sizes, none, or more or fewer than labels.
    """
    check_type("images", images, Iterable, "images, uint8 [height, width, C] each")
    labels = [as_int("labels", label) for label in as_list("labels", labels, "an integer for each image")]
    written, shape = 0, None
    with whole_file(as_path("path", path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for pixels in images:
                if not isinstance(pixels, np.ndarray):
                    raise wrong_type("images", pixels, "NumPy arrays of uint8, [height, width, C] each")
                if shape is None:
                    shape = (*pixels.shape[:2], 3)
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
                    np.lib.format.write_array_header_1_0(stream, header)
                if pixels.shape not in (shape, (*shape[:2], 1)) or pixels.dtype != np.uint8:
                    raise ValueError(f"images: got {pixels.dtype} {pixels.shape}, expected uint8 {shape} as the first one")
                stream.write(np.broadcast_to(pixels, shape).tobytes())
                written += 1
        if not written or written != len(labels):
            raise ValueError(f"images: got {written}, expected {len(labels)}, one or more and one for each label")
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, np.asarray(labels, dtype=np.int64))


def _check_pixels(name: str, pixels: object, shape: str) -> None:
    expected = f"a NumPy array of uint8, {shape} with C = 1 or 3"
    if not isinstance(pixels, np.ndarray):
        raise wrong_type(name, pixels, expected)
    if pixels.dtype != np.uint8 or pixels.ndim != shape.count(",") + 1 or pixels.shape[-1] not in (1, 3):
        raise ValueError(f"{name}: got {describe(pixels)}, expected {expected}")


def _number(value: int, scale: int) -> Pixels:
    columns = []
    for digit in str(value):
        bits = np.array([[row >> (2 - column) & 1 for column in range(3)] for row in _GLYPHS[digit]], np.uint8)
        columns += [bits, np.zeros((5, 1), np.uint8)]
    glyphs = np.concatenate(columns[:-1], axis=1).repeat(scale, axis=0).repeat(scale, axis=1)
    return (_BACKGROUND + glyphs * 200).astype(np.uint8)
