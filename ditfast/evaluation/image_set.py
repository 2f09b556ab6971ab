"""Images to evaluate, read in batches: a folder of PNG files, or an ``.npz`` file in the layout of ADM's evaluator."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..argument_checks import check_type
from ..files import visible_entries
from ..image_files import find_images, open_image, upright, upright_size
from ..images import Pixels
from ..sampling.folder import RECORD
from ..sampling.painter import label_of
from .errors import EvaluationError, one_line

MODES = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class ImageSet:
    """N images of one size; ``batches`` raises EvaluationError where one cannot be read."""

    source: str  # where they come from, for messages
    shape: tuple[int, int, int, int]  # (N, H, W, C), C = 1 or 3
    labels: NDArray[np.int64] | None  # [N], where the source tells
    batches: Callable[[int], Iterator[Pixels]]  # of up to so many, [n, H, W, C] 8-bit, in order

    def __len__(self) -> int:
        return self.shape[0]


def open_images(path: str | os.PathLike[str]) -> ImageSet:
    """Open the images of a folder or an ``.npz`` file; sizes are checked here, pixels are read later.

    A folder has 8-bit grey or RGB PNG files, all of one size when turned upright, in the order of their names, or has folders
    of them, at any depth: those in it that have a class's number for a name (``7/cat.png``) are then the labels. A warning
    names images that are left out; hidden files, and what systems leave behind, are none. A folder of ``ditfast sample`` has
    its labels in ``run.json``, and other files are left out, such as the grid. An ``.npz`` file has ``arr_0`` [N, H, W, 3] of
    dtype uint8 and may have ``arr_1`` [N], the labels; it is read as a stream.

    Raises:
        EvaluationError: nothing there, no images, an unreadable one, images of different sizes, or an unfinished run.
        TypeError: the path is none.
    """
    check_type("path", path, (str, os.PathLike), "a path")
    path = Path(path)
    if path.is_dir():
        try:
            return _open_folder(path)
        except OSError as error:
            raise EvaluationError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    if path.is_file() and path.suffix == ".npz":
        return _open_npz(path)
    came = "a file" if path.is_file() else "nothing there"
    raise EvaluationError(f"{path}: {came}, expected a folder of PNG files or an .npz file")


# ------------------------------------------------------------------------------------------------ folders
def _open_folder(folder: Path) -> ImageSet:
    run = run_labels(folder)
    names = [name for name, _ in find_images(folder)] if run is None else [entry.name for entry in visible_entries(folder)]
    pngs = [name for name in names if name.lower().endswith(".png")]
    direct = [name for name in pngs if "/" not in name]
    if run is not None:
        used = [name for name in direct if Path(name).stem.isdecimal()]
        if len(used) != len(run):
            raise EvaluationError(f"{folder}: {len(used)} of the {len(run)} images of its {RECORD}; expected a finished run")
    else:
        used = direct or pngs
        if used and (left_out := sorted(set(names) - set(used))):
            expected = "PNG files only, in the folder itself or in folders of it"
            warnings.warn(
                f"{folder}: {len(left_out)} images are left out, such as {left_out[0]}; expected {expected}", stacklevel=3
            )
    if not used:
        raise EvaluationError(f"{folder}: no PNG files, expected some (or an .npz file's name)")
    labels = run if run is not None else _names_as_labels(used)
    files = [folder / name for name in used]
    width, height, mode = first = _header(files[0])
    for file in files:
        if (other := _header(file)) != first:
            raise EvaluationError(f"{file}: {_described(other)}, but {files[0]} is {_described(first)}; expected one size")

    def batches(size: int) -> Iterator[Pixels]:
        for start in range(0, len(files), size):
            yield np.stack([_pixels(file, (height, width)) for file in files[start : start + size]])

    return ImageSet(str(folder), (len(files), height, width, MODES[mode]), labels, batches)


def _names_as_labels(names: list[str]) -> NDArray[np.int64] | None:
    classes = [name.partition("/")[0] for name in names if "/" in name]
    numbered = all(name.isascii() and name.isdecimal() and len(name) < 10 for name in classes)
    return np.array(classes, dtype=np.int64) if classes and numbered else None


def run_labels(folder: Path) -> NDArray[np.int64] | None:
    """[N]: the classes that a run of ``ditfast sample`` was asked for; None where the folder has no such run's record."""
    try:
        settings = json.loads((folder / RECORD).read_text("utf-8"))["settings"]
        classes = settings["classes"]
        if classes == "all":
            classes = range(settings["model"]["num_classes"])
        labels = [label_of(k, classes, settings["per_class"], settings["seed"]) for k in range(settings["num"])]
        return np.array(labels, dtype=np.int64)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _header(path: Path) -> tuple[int, int, str]:
    """Return width, height and mode, upright, of which only the file's beginning is read."""
    with _opened(path) as image:
        if image.mode not in MODES:
            raise EvaluationError(f"{path}: {image.mode} pixels, expected 8-bit grey (L) or RGB")
        return *upright_size(image), image.mode


def _pixels(path: Path, expected: tuple[int, int]) -> Pixels:
    with _opened(path) as image:
        pixels = np.asarray(upright(image), dtype=np.uint8)
    height, width = pixels.shape[:2]
    if (height, width) != expected:  # the orientation may stand behind the pixels
        raise EvaluationError(
            f"{path}: {width}x{height} pixels when turned upright, expected {expected[1]}x{expected[0]} as of the first image"
        )
    return pixels.reshape(height, width, -1)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with open_image(path, ("PNG",)) as image:
            yield image
    except EvaluationError:
        raise
    except ImportError as error:
        raise EvaluationError("PNG files are read by Pillow, which is not installed: pip install 'ditfast[eval]'") from error
    except Exception as error:  # a broken file makes Pillow raise OSError, SyntaxError, ValueError, zlib.error, ...
        raise EvaluationError(f"{path}: not a readable PNG file: {one_line(error)}") from error


def _described(header: tuple[int, int, str]) -> str:
    width, height, mode = header
    return f"{width}x{height} {'grey' if mode == 'L' else mode}"


# ------------------------------------------------------------------------------------------------ npz
def _open_npz(path: Path) -> ImageSet:
    with _npz_errors(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in names:
            raise EvaluationError(f"{path}: got the arrays {', '.join(names) or '(none)'}, expected arr_0, uint8 [N, H, W, 3]")
        with archive.open("arr_0.npy") as stream:
            shape, fortran, dtype = _array_header(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
        order = ", Fortran order" if fortran else ""
        raise EvaluationError(f"{path}: arr_0 is {dtype} {list(shape)}{order}, expected uint8 [N, H, W, 3]")
    if not shape[0]:
        raise EvaluationError(f"{path}: arr_0 has no images, expected some")

    def batches(size: int) -> Iterator[Pixels]:
        with _npz_errors(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            _array_header(stream)
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                content = stream.read(count * int(np.prod(shape[1:])))
                yield np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])

    labels = npz_array(path, "arr_1") if "arr_1" in names else None
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        raise EvaluationError(f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}, expected integer labels [{shape[0]}]")
    return ImageSet(str(path), shape, None if labels is None else labels.astype(np.int64), batches)


def npz_array(path: Path, name: str) -> NDArray[Any] | None:
    """An array of an ``.npz`` file, None where it has none of that name."""
    with _npz_errors(path), np.load(path, allow_pickle=False) as arrays:
        return arrays.get(name)


def _array_header(stream: Any) -> tuple[Any, bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)


@contextlib.contextmanager
def _npz_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except EvaluationError:
        raise
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not a readable .npz file: {one_line(error)}") from error
