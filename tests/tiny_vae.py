"""A VAE small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def tiny(**settings: Any) -> Any:
    """4 latent channels, images of twice their size; the test that asks for it is skipped without diffusers."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks, **settings)


def saved(folder: Path, **settings: Any) -> Path:
    tiny(**settings).save_pretrained(folder)
    return folder
