"""Latents of a folder of images, written once, so that training need not encode."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import vae as autoencoder
from ..files import whole_file
from ..sampling.ranks import Ranks
from ..sampling.settings import device_kind, digest, versions
from .data.images import ImageFolder, to_unit
from .data.latents import Index, ShardFolder
from .data.records import BadRecord
from .data.shards import DTYPE, UNREADABLE, shard_bytes

_BYTES_BESIDE_MOMENTS = 1024  # of an image in a shard, most of them its name


class Extraction:
    """Shards of moments, each of a fixed block of images: killed and started again it writes the missing ones, the same bytes.

    It encodes ``batch`` images together, and as many mirrored; ``shard`` images are in a file, ``readers`` threads read them.
    """

    def __init__(self, images: ImageFolder, vae: autoencoder.VAE, out: Path, batch: int, shard: int, readers: int):
        self.images, self.vae, self.readers = images, vae, readers
        self.index = Index(
            images=len(images),
            files=images.files,
            image_size=images.image_size,
            num_classes=images.num_classes,
            latents=autoencoder.latent_shape(vae, images.image_size),
            vae={"weights": digest(vae.state_dict()), **autoencoder.scaling(vae)},
            shard=shard,
            batch=batch,
            device=device_kind(vae.device),
            versions=versions(),
        )
        self.blocks = self.index.blocks()
        self.folder = ShardFolder(out, num=len(self.blocks), batch=1)

    def claim(self, about: Mapping[str, Any]) -> None:
        """Makes the folder, or finds that it is an earlier run's with the same settings; ``about`` is not compared.

        Raises:
            FolderError: it cannot be written, holds something else, or the disk has too little room.
        """
        moments = torch.Size(self.index.moments_shape).numel() * DTYPE.itemsize
        in_a_shard = len(self.blocks[0])
        self.folder.claim(dataclasses.asdict(self.index), about, in_a_shard * (moments + _BYTES_BESIDE_MOMENTS))

    def unfinished(self, ranks: Ranks) -> list[int]:
        """The missing shards that are this rank's."""
        return [shard for block in self.folder.unfinished(ranks) for shard in block]

    def write(self, shards: Iterable[int], advance: Callable[[float], None] = lambda images: None) -> None:
        """Writes shards by their numbers; an unreadable image is named by a warning, and its place marked.

        Raises:
            FloatingPointError: latents came out infinite or NaN.
            RunStopped: the disk is full, or fails.
        """
        for shard in shards:
            content = self._content(self.blocks[shard], advance)
            self.folder.write_once(self.folder.file(shard).name, partial(_write, content=content))

    def _content(self, block: range, advance: Callable[[float], None]) -> bytes:
        names = [self.images.names[number] for number in block]
        labels = [self.images.labels[number] for number in block]
        parts = []
        with ThreadPoolExecutor(self.readers) as pool, _without_waiting(pool):
            reading = pool.map(self._read, block)
            for start in range(0, len(block), self.index.batch):
                places = range(start, min(start + self.index.batch, len(block)))
                read = [next(reading) for _ in places]
                blank = torch.zeros(3, self.images.image_size, self.images.image_size, dtype=torch.uint8)
                moments = self._moments(torch.stack([blank if isinstance(found, BadRecord) else found for found in read]))
                for place, found, image in zip(places, read, moments, strict=True):  # image: [2, 2C, H, W]
                    if isinstance(found, BadRecord):
                        warnings.warn(f"unreadable image: {found}", stacklevel=3)
                        labels[place] = UNREADABLE
                        image.zero_()
                    elif not image.isfinite().all():
                        raise FloatingPointError(f"the latents of {names[place]} came out infinite or NaN")
                parts.append(moments)
                advance(len(places))
        return shard_bytes(torch.cat(parts), labels, names)

    def _moments(self, pixels: Tensor) -> Tensor:
        """[n, 2, 2C, H, W] of [n, 3, size, size] 8-bit."""
        images = to_unit(pixels.to(self.vae.device))  # [n, 3, size, size]
        both = [autoencoder.encode_moments(self.vae, flipped, self.index.batch) for flipped in (images, images.flip(-1))]
        return torch.stack(both, 1).to(DTYPE).cpu()  # [n, 2, 2C, H, W]

    def _read(self, number: int) -> Tensor | BadRecord:
        try:
            return self.images[number].values
        except BadRecord as error:
            return error


@contextmanager
def _without_waiting(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Read nothing more once an exception ends the block."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
