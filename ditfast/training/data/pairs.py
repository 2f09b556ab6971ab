"""A map-style dataset of (x, y) as data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ...argument_checks import as_int, describe
from ...checkpoints.errors import one_line
from .records import BadRecord, Data, DataError, Record

_ATTRIBUTES = ("input_shape", "num_classes", "fingerprint", "clean", "__len__", "__getitem__")
_OWN = {"input_shape", "fingerprint", "clean"}  # which no dataset of other libraries has
_SAMPLED = 16  # records that the fingerprint covers
_A_DATASET = "ditfast.training.Data, as open_data returns, or a map-style dataset of (x, y)"


def as_data(data: Any, num_classes: int) -> Data:
    """Return data as it is, and a map-style dataset as ``Pairs``.

    Args:
        data: ``Data``, or anything with a length whose items are pairs (x, y).
        num_classes: the labels of a dataset that does not say its own number of classes.

    Raises:
        TypeError: it is neither, or its ``num_classes`` is no number.
        ValueError: its ``num_classes`` is no positive integer.
        DataError: its records are no pairs of an image and a label.
    """
    missing = [name for name in _ATTRIBUTES if not hasattr(data, name)]
    if not missing:
        return data
    if has := sorted(_OWN - set(missing)):
        raise TypeError(f"data: got {describe(data)} with {has[0]} but without {', '.join(missing)}, expected {_A_DATASET}")
    if isinstance(data, DataLoader):
        raise TypeError("data: got a DataLoader, expected the dataset that it loads: its .dataset")
    if isinstance(data, IterableDataset):
        raise TypeError(f"data: got {describe(data)}, an IterableDataset, whose records have no numbers; expected {_A_DATASET}")
    if isinstance(data, (Mapping, Tensor, str, bytes, type)) or {"__len__", "__getitem__"} & set(missing):
        raise TypeError(f"data: got {describe(data)}, expected {_A_DATASET}")
    return Pairs(data, num_classes)


class Pairs:
    """Pairs (x, y) of a map-style dataset: x [C, H, W] floats on the CPU, y an integer.

    Records are used as they come, in fp32, and never mirrored: that is for the dataset's own transforms. A record whose
    ``__getitem__`` raises is unreadable, and so is one that is no such pair.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, such as a torch Dataset or a list of tuples.
        num_classes: if neither ``num_classes`` nor ``classes`` of the dataset tells it.

    Attributes:
        class_names: the dataset's ``classes``, if they are names; else None.
        fingerprint: the number of records, their shape, and a digest of a few of them, without the images or labels that
            are others each time a record is read, as random transforms make them.

    Raises:
        DataError: there are no records, the first few are all unreadable, or one is no such pair.
    """

    def __init__(self, dataset: Any, num_classes: int):
        self.dataset = dataset
        self.num_classes = _num_classes(dataset, num_classes)
        self.class_names = _class_names(dataset)
        if not len(dataset):
            raise DataError("data: got a dataset without records, expected a batch of them or more")
        with _kept_generators():
            self.input_shape, self.fingerprint = self._look()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        item = self._read(index)
        try:
            record = _record(item, self.num_classes)
        except ValueError as error:
            raise BadRecord(f"record {index} {error}") from error
        if record.values.shape != self.input_shape:
            shape = tuple(record.values.shape)
            raise BadRecord(f"record {index} whose x is of shape {shape}, expected {self.input_shape}, as others")
        return record

    def clean(self, values: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        return values.float()

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:  # whatever a dataset raises of a file that it cannot read
            raise BadRecord(f"record {index}: {type(error).__name__}: {one_line(str(error))}") from error

    def _look(self) -> tuple[tuple[int, int, int], str]:
        """Read a few records, spread evenly, twice; return their shape and the fingerprint."""
        count = len(self)
        found: dict[int, tuple[Record, Record]] = {}
        unreadable = ""
        for index in dict.fromkeys(place * (count - 1) // (_SAMPLED - 1) for place in range(_SAMPLED)):
            try:
                items = self._read(index), self._read(index)
            except BadRecord as error:
                unreadable = unreadable or str(error)
                continue
            try:
                found[index] = _record(items[0], self.num_classes), _record(items[1], self.num_classes)
            except ValueError as error:
                raise DataError(f"data: got record {index} {error}") from error
        if not found:
            raise DataError(f"data: got records that cannot be read, all of the {min(count, _SAMPLED)} tried: {unreadable}")
        shapes = {tuple(record.values.shape) for records in found.values() for record in records}
        if len(shapes) > 1:
            came = " and ".join(map(str, sorted(shapes)))
            raise DataError(f"data: got records of the shapes {came}, expected one shape: crop them in the dataset's transform")
        fixed = all(torch.equal(one.values, other.values) for one, other in found.values())
        fixed_labels = all(one.label == other.label for one, other in found.values())
        digest = hashlib.sha256()
        for index, (record, _) in found.items():
            label = record.label if fixed_labels else "-"
            digest.update(f"{index} {label} {record.values.dtype}\n".encode())
            if fixed:
                digest.update(record.values.contiguous().view(torch.uint8).numpy().data)
        if fixed:
            what = "bits" if fixed_labels else "images, labels are drawn anew,"
        else:
            what = "labels, images are drawn anew" if fixed_labels else "dtypes, images and labels are drawn anew,"
        channels, height, width = shapes.pop()
        shape = channels, height, width
        return shape, f"{count} pairs {list(shape)}, {what} of {len(found)}: {digest.hexdigest()[:16]}"


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Leave the global generators of torch (the CPU's), NumPy and Python as they were."""
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002 (the global one)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


def _record(item: Any, num_classes: int) -> Record:
    """Return a dataset's item as a record; the ValueError says what is wrong with it, after the record's number."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        came = f"a dict of {', '.join(map(str, item))}" if isinstance(item, Mapping) else describe(item)
        raise ValueError(f"that is {came}, expected a pair (x, y)")
    x, y = item
    if not isinstance(x, Tensor):
        hint = "torch.from_numpy" if isinstance(x, np.ndarray) else "a transform such as torchvision's ToTensor"
        raise ValueError(f"whose x is {describe(x)}, expected a tensor [C, H, W] of floats: {hint} makes one")
    if not x.is_floating_point():
        hint = ": x.float() / 127.5 - 1" if x.dtype == torch.uint8 else ""
        raise ValueError(f"whose x is {describe(x)}, expected floats of about unit variance, or in [-1, 1]{hint}")
    if x.dim() != 3:
        raise ValueError(f"whose x is of shape {tuple(x.shape)}, expected [C, H, W]")
    if x.device.type != "cpu":
        raise ValueError(f"whose x is on {x.device}, expected the CPU: each batch is moved as a whole")
    try:
        return Record(x.detach(), as_int("y", y, 0, num_classes - 1))
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace("y: got", "whose y is", 1)) from error


def _class_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)  # torchvision's datasets
    return list(names) if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names) else None


def _num_classes(dataset: Any, otherwise: int) -> int:
    said = getattr(dataset, "num_classes", None)
    if said is not None:
        return as_int("data.num_classes", said, 1)
    names = getattr(dataset, "classes", None)  # torchvision's datasets
    return len(names) if isinstance(names, (list, tuple)) and names else otherwise
