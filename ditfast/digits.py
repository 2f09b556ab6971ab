"""A trained model small enough to ship: scanned 8x8 digits, ten classes, in pixel space."""

from __future__ import annotations

from importlib import resources

import torch
from torch import Tensor

from .checkpoints import load_checkpoint
from .config import DiTConfig
from .model import DiT

DIGITS_CONFIG = DiTConfig(
    depth=6, hidden_size=128, num_heads=4, patch_size=2, input_size=8, in_channels=1, num_classes=10, class_dropout_prob=0.1
)


def load_digits() -> DiT:
    """The digits model in eval mode, fp32 on the CPU: input [B, 1, 8, 8] in [-1, 1], labels 0..9, null class 10.

    Made of scikit-learn's 1,797 scans by ``ditfast train --data digits --steps 5000 --out run`` and
    ``ditfast convert run/model.safetensors digits.safetensors --to official --dtype bf16``.
    """
    with resources.as_file(resources.files("ditfast.data") / "digits.safetensors") as path:
        return load_checkpoint(path.resolve()).float()  # an editable install is a link: one path for all who import it


def real_digits() -> tuple[Tensor, Tensor]:
    """What the model was trained on: scans [1797, 1, 8, 8] fp32 in [-1, 1] and labels [1797]; needs scikit-learn."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    scans = torch.tensor(pixels, dtype=torch.float32, device="cpu").view(-1, 1, 8, 8) / 8 - 1
    return scans, torch.tensor(labels, device="cpu")
