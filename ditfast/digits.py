"""A trained model small enough to ship: scanned 8x8 digits, ten classes, in pixel space."""

from __future__ import annotations

import json
from importlib import resources

import torch
from safetensors import safe_open
from torch import Tensor

from .config import DiTConfig
from .model import DiT


def load_digits() -> DiT:
    """The digits model in eval mode, fp32 on the CPU: input [B, 1, 8, 8] in [-1, 1], labels 0..9, null class 10.

    Trained by ``examples/train_digits.py`` on scikit-learn's 1,797 scans; the weights, an EMA, are stored as bf16.
    """
    file = resources.files("ditfast.data") / "digits.safetensors"
    with resources.as_file(file) as path, safe_open(path, framework="pt") as checkpoint:
        config = DiTConfig(**json.loads(checkpoint.metadata()["config"]))
        weights = {name: checkpoint.get_tensor(name) for name in checkpoint.keys()}  # noqa: SIM118 (not a dict)
    model = DiT(config)
    model.load_state_dict(weights)
    return model.eval()


def real_digits() -> tuple[Tensor, Tensor]:
    """What the model was trained on: scans [1797, 1, 8, 8] fp32 in [-1, 1] and labels [1797]; needs scikit-learn."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
