"""A folder that ``ditfast extract-latents`` wrote, as data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import vae as autoencoder
from ...sampling.folder import RunFolder
from ...sampling.settings import digest
from .records import DataError, Record
from .shards import UNREADABLE, Shard

INDEX = "index.json"


class ShardFolder(RunFolder):
    """Shards, and ``index.json``."""

    suffix = ".safetensors"
    content = "shard"
    record = INDEX


@dataclass(frozen=True)
class Index:
    """What decides the bytes of a folder's shards."""

    images: int  # how many
    files: str  # a digest of their names and sizes
    image_size: int
    num_classes: int
    latents: tuple[int, int, int]  # (C, H, W)
    vae: Mapping[str, Any]  # weights, their digest, and autoencoder.scaling
    shard: int  # images in a shard
    batch: int  # images encoded together
    device: str  # its kind
    versions: Mapping[str, str]

    @property
    def moments_shape(self) -> tuple[int, int, int, int]:
        """(2, 2C, H, W): of an image and its mirror image, mean and standard deviation."""
        channels, height, width = self.latents
        return 2, 2 * channels, height, width

    def blocks(self) -> list[range]:
        """The images of each shard."""
        return [range(start, min(start + self.shard, self.images)) for start in range(0, self.images, self.shard)]

    @classmethod
    def read(cls, path: Path) -> Index:
        try:
            return cls(**json.loads(path.read_text("utf-8"))["settings"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"data: {path}: does not hold what ditfast extract-latents writes") from error


class Latents:
    """Moments [2, 2C, H, W] fp16 of images and their mirror images; latents are drawn anew each time they are seen.

    Args:
        path: of the folder.
        vae: whose latents they have to be; None where nobody decodes them.

    Attributes:
        unreadable: how many images could not be read when latents were extracted.
        image_size: pixels along a side of the images.
        latent_scale: of their VAE, as ``autoencoder.scaling`` has it.
        class_names: of the images; None in folders of earlier versions.

    Raises:
        DataError: shards are missing, cut off or something else, no image was readable, or they are another VAE's.
    """

    def __init__(self, path: Path, vae: autoencoder.VAE | None = None):
        self.path = path
        self.index = index = Index.read(path / INDEX)
        blocks = index.blocks()
        folder = ShardFolder(path, num=len(blocks), batch=1)
        if missing := folder.missing():
            counts = f"{len(missing)} of {len(blocks)} shards are not there, such as {folder.file(missing[0]).name}"
            raise DataError(f"data: {path}: {counts}; the same ditfast extract-latents command makes them")
        self._shards = [Shard(folder.file(k), index.moments_shape) for k in range(len(blocks))]
        for shard, block in zip(self._shards, blocks, strict=True):
            if len(shard) != len(block):
                raise DataError(f"data: {shard.path}: {len(shard)} images, expected {len(block)}")
        self.unreadable = sum(int((shard.labels == UNREADABLE).sum()) for shard in self._shards)
        if self.unreadable == index.images:
            raise DataError(f"data: {path}: none of the {index.images} images could be read when latents were extracted")
        if vae is not None and digest(vae.state_dict()) != index.vae["weights"]:
            raise DataError(f"data: {path}: latents of another VAE than the one given")
        channels, height, width = index.latents
        self.input_shape = channels, height, width
        self.num_classes = index.num_classes
        self.image_size = index.image_size
        self.latent_scale = {name: index.vae[name] for name in ("scaling_factor", "shift_factor")}
        self.class_names = _class_names(path / INDEX)
        settings = hashlib.sha256(json.dumps(dataclasses.asdict(index), sort_keys=True).encode()).hexdigest()[:16]
        self.fingerprint = f"latents of {len(self)} images, {settings}"

    def __reduce__(self) -> tuple[type[Latents], tuple[Path]]:
        """Shards are mapped into memory anew in another process."""
        return Latents, (self.path,)

    def __len__(self) -> int:
        return self.index.images

    def __getitem__(self, index: int) -> Record:
        shard, place = divmod(index, self.index.shard)
        return self._shards[shard][place]

    def clean(self, values: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        moments = values[torch.arange(len(values), device=values.device), flips.long()]  # [b, 2C, H, W]
        return autoencoder.draw_latents(moments, noise, **self.latent_scale)  # [b, C, H, W]


def _class_names(path: Path) -> list[str] | None:
    names = json.loads(path.read_text("utf-8")).get("about", {}).get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
