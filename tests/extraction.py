"""What tests of extracted latents start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_vae import tiny

from ditfast.images import save_png
from ditfast.sampling.ranks import Ranks
from ditfast.training.data import ImageFolder
from ditfast.training.extract import Extraction

pytest.importorskip("PIL")
SIZE = 16


def photographs(folder: Path, count: int = 7) -> list[Path]:
    """Images of two classes, in order."""
    paths = [folder / ("ant" if k < count // 2 else "bee") / f"{k}.png" for k in range(count)]
    for k, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, np.random.default_rng(k).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8))
    return paths


def extraction(tmp_path: Path, out: str = "latents", shard: int = 3, readers: int = 2) -> Extraction:
    """Of ``photographs`` in ``tmp_path``."""
    vae = tiny(scaling_factor=0.5, shift_factor=0.25).eval()
    return Extraction(ImageFolder(tmp_path / "photographs", SIZE), vae, tmp_path / out, batch=2, shard=shard, readers=readers)


def extracted(tmp_path: Path, out: str = "latents", readers: int = 2) -> Path:
    run = extraction(tmp_path, out, readers=readers)
    run.claim({})
    run.write(run.unfinished(Ranks()))
    return run.folder.path
