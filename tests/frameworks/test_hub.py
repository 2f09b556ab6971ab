"""huggingface_hub's mixin for classes of one's own, and diffusers' own files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm_style
import torch
from foreign import diffusers
from framework_models import assert_fast, assert_same_output, assert_same_tensors, batches, pair, train, weights_of
from safetensors.torch import load_file
from torch import Tensor, nn

import ditfast

hub = pytest.importorskip("huggingface_hub")

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]


class HubDiT(ditfast.DiT, hub.PyTorchModelHubMixin):
    pass


class HubOfficial(timm_style.DiT, hub.PyTorchModelHubMixin):
    pass


class HubDenoiser(nn.Module, hub.PyTorchModelHubMixin):
    """A model of one's own around a ditfast.DiT."""

    def __init__(self, depth: int = 2):
        super().__init__()
        config = ditfast.DiTConfig(depth=depth, hidden_size=64, num_heads=4, input_size=8, num_classes=10)
        self.denoiser = ditfast.DiT(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser(x, t, y)


def test_subclass_of_ditfast_comes_back(tmp_path: Path) -> None:
    fast, untouched = pair("DiT")
    assert isinstance(fast, ditfast.DiT)
    model = HubDiT(fast.config)
    model.load_state_dict(fast.state_dict())
    train("DiT", model, batches(2))
    train("DiT", untouched, batches(2))
    model.save_pretrained(tmp_path)
    loaded = HubDiT.from_pretrained(str(tmp_path))
    assert type(loaded) is HubDiT
    assert loaded.config == model.config
    assert_same_tensors(loaded.state_dict(), weights_of(model))
    assert_same_output("DiT", loaded, untouched)


def test_model_around_ditfast_comes_back(tmp_path: Path) -> None:
    _, untouched = pair("DiT")
    model = HubDenoiser(depth=2)
    model.denoiser.load_state_dict(untouched.state_dict())
    model.save_pretrained(tmp_path)
    expected = {f"denoiser.{name}": value for name, value in untouched.state_dict().items()}
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), expected)
    assert_same_output("DiT", HubDenoiser.from_pretrained(tmp_path), untouched)


def test_accelerated_official_model_comes_back(tmp_path: Path) -> None:
    fast, untouched = pair("official")
    model = HubOfficial(depth=2)
    model.load_state_dict(fast.state_dict())
    ditfast.accelerate(model.train())
    train("official", model, batches(2))
    train("official", untouched, batches(2))
    assert_fast("official", model, steps=2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["depth"] == 2
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), model.state_dict())
    loaded = HubOfficial.from_pretrained(tmp_path)
    assert_same_output("official", loaded, untouched)
    assert_same_output("official", ditfast.accelerate(loaded), untouched)
    assert_fast("official", loaded, predictions=1)


def test_accelerated_diffusers_model_comes_back(tmp_path: Path) -> None:
    fast, untouched = pair("diffusers")
    train("diffusers", fast, batches(2))
    train("diffusers", untouched, batches(2))
    for name, model in (("fast", fast), ("untouched", untouched)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "fast/config.json").read_text() == (tmp_path / "untouched/config.json").read_text()
    assert_same_tensors(load_file(tmp_path / "fast/diffusion_pytorch_model.safetensors"), fast.state_dict())
    loaded = diffusers().DiTTransformer2DModel.from_pretrained(tmp_path / "fast")
    assert_same_output("diffusers", loaded, untouched)
    assert_same_output("diffusers", ditfast.accelerate(loaded), untouched)
    assert_fast("diffusers", loaded, predictions=1)
    half = diffusers().DiTTransformer2DModel.from_pretrained(tmp_path / "fast", torch_dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}


def test_config_is_readable(tmp_path: Path) -> None:
    fast, _ = pair("DiT")
    assert isinstance(fast, ditfast.DiT)
    HubDiT(fast.config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    fields = {field.name for field in dataclasses.fields(fast.config)}
    assert fields & set(written)
