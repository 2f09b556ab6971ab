"""A stand-in of torch-fidelity's Inception: its interface, small weights."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import ditfast.evaluation  # noqa: F401  (brings the modules below)

compare_module, inception_module = (sys.modules[f"ditfast.evaluation.{name}"] for name in ("compare", "inception"))
POOLED, SIZE = 6, 2
SPATIAL = SIZE * SIZE * 7


class StandIn(nn.Module):
    """A stand-in for ``FeatureExtractorInceptionV3``: what ditfast uses of it, narrow and untrained."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 4, stride=4)
        self.pool, self.head = nn.Linear(3 * 8 * 8, POOLED), nn.Linear(POOLED, 4, bias=False)
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1:] == (3, 8, 8)
        x = x / 255
        self.Mixed_6d.branch1x1(x)
        pooled = self.pool(x.flatten(1))
        return pooled, self.head(pooled)


def install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in torch-fidelity's place, and write its weights."""
    torch.save(StandIn("", ["2048", "logits_unbiased"], None).state_dict(), path)
    library = SimpleNamespace(__version__="0.0", FeatureExtractorInceptionV3=StandIn)
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    monkeypatch.setattr(inception_module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(compare_module, "POOLED", POOLED)
    monkeypatch.setattr(compare_module, "SPATIAL", SPATIAL)
