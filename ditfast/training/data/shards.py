"""Files of moments: a safetensors file of a few hundred images' latents, both as they are and mirrored.

    moments    [n, 2, 2C, H, W] fp16: of image and mirror image, mean and standard deviation
    labels     [n] int64; UNREADABLE where the image could not be read
    checksums  [n] int64: CRC-32 of each image's moments
    metadata   names: of the images, a JSON list

In fp16 ImageNet at 256 pixels is 42 GB, in fp32 84; a mean is rounded by at most 2^-11 of itself, far less than what the
decoder can tell apart, and bf16 would round by eight times as much.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .records import BadRecord, DataError, Record

DTYPE = torch.float16
UNREADABLE = -1
_NAMES = "names"  # the only metadata: of several, safetensors writes them in any order, and bytes would differ


def shard_bytes(moments: Tensor, labels: Sequence[int], names: Sequence[str]) -> bytes:
    """Return the content of a shard of moments [n, 2, 2C, H, W] of ``DTYPE``."""
    tensors = {
        "moments": moments.contiguous(),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "checksums": torch.tensor([_checksum(image) for image in moments], dtype=torch.int64),
    }
    return save(tensors, {_NAMES: json.dumps(list(names))})


class Shard:
    """A file of moments, (2, 2C, H, W) of an image, mapped into memory.

    Raises:
        DataError: it is not there, cut off, or something else.
    """

    def __init__(self, path: Path, moments_shape: Sequence[int]):
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            self._moments = self._file.get_slice("moments")
            self.labels = self._file.get_tensor("labels")
            self._checksums = self._file.get_tensor("checksums")
            shape = self._moments.get_shape()
        except (OSError, SafetensorError) as error:
            raise DataError(f"data: {path}: {str(error).splitlines()[0]}") from error
        expected = [len(self.labels), *moments_shape]
        if shape != expected or self._moments.get_dtype() != "F16":
            raise DataError(f"data: {path}: moments {self._moments.get_dtype()} {shape}, expected F16 {expected}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> Record:
        """[2, 2C, H, W] of ``DTYPE``; raises ``BadRecord`` where the image could not be read, or the moments changed since."""
        label = int(self.labels[place])
        if label == UNREADABLE:
            raise BadRecord(f"{self._name(place)}: its image could not be read when latents were extracted")
        moments = self._moments[place]
        if _checksum(moments) != int(self._checksums[place]):
            raise BadRecord(f"{self._name(place)}: its bits have changed since it was written")
        return Record(moments, label)

    def _name(self, place: int) -> str:
        return f"{self.path}: record {place} ({json.loads(self._file.metadata()[_NAMES])[place]})"


def _checksum(moments: Tensor) -> int:
    return zlib.crc32(moments.contiguous().numpy().data)
