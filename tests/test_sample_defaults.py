"""Defaults of ``ditfast.sample`` and the command: whose they are, and which VAE decodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import randomize
from tiny_vae import tiny

import ditfast
from ditfast import DiT, DiTConfig
from ditfast.checkpoints.trained_for import TrainedFor
from ditfast.cli import main
from ditfast.digits import DIGITS_CONFIG
from ditfast.images import load_png
from ditfast.sampling.models import Denoiser
from ditfast.sampling.recipe import default_dtype, default_vae

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5)


def test_a_gpu_draws_in_bf16_and_a_cpu_in_fp32() -> None:
    assert default_dtype(torch.device("cuda", 1)) == "bf16"
    assert default_dtype(torch.device("cpu")) == "fp32"


def new_dit(config: DiTConfig = CONFIG) -> DiT:
    model = randomize(DiT(config)).eval()
    assert isinstance(model, DiT)
    return model


def test_a_checkpoint_of_the_digits_has_their_defaults_in_the_command_too(tmp_path: Path) -> None:
    ditfast.save_checkpoint(ditfast.load_digits(), tmp_path / "digits.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "digits.safetensors"), "--classes", "3", "--out", str(tmp_path / "out")]
    assert main(["sample", *arguments]) == 0
    image = ditfast.sample(ditfast.load_checkpoint(tmp_path / "digits.safetensors"), [3]).images[0]
    assert (load_png(tmp_path / "out" / "000000.png") == image[..., :1]).all()


def test_a_model_without_a_null_class_is_not_guided_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, in_channels=1, class_dropout_prob=0.0)
    assert ditfast.sample(new_dit(config), [3], num_steps=2).settings["cfg_scale"] == 1
    ditfast.save_checkpoint(new_dit(config), tmp_path / "dit.pt")
    arguments = ["--checkpoint", str(tmp_path / "dit.pt"), "--classes", "3", "--steps", "2"]
    assert main(["sample", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert ", guidance 1, " in capsys.readouterr().out


def test_a_digits_model_of_another_prediction_has_the_digits_defaults() -> None:
    model = new_dit(dataclasses.replace(DIGITS_CONFIG, prediction="v"))
    settings = ditfast.sample(model, [3]).settings
    assert (settings["solver"], settings["num_steps"], settings["cfg_scale"]) == ("ddim", "ddim50", 2.0)


def test_the_vae_beside_a_transformers_folder_is_its_pipelines(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    for name in ("transformer", "other"):
        (tmp_path / name).mkdir()
    assert default_vae(CONFIG, str(tmp_path), TrainedFor()) == str(tmp_path)
    assert default_vae(CONFIG, str(tmp_path / "transformer"), TrainedFor()) == str(tmp_path)
    assert default_vae(CONFIG, str(tmp_path / "other"), TrainedFor()) == ditfast.vae.OFFICIAL


def test_a_vae_given_by_name_is_moved_to_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, devices = tiny().eval(), []

    def to(device: torch.device) -> Any:
        devices.append(device)
        return vae

    monkeypatch.setattr(vae, "to", to)
    monkeypatch.setattr(ditfast.vae, "load_vae", lambda source: vae)
    ditfast.sample(new_dit(), [3], num_steps=2, vae="folder")
    assert devices == [torch.device("cpu")]


def test_a_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, look = [], Denoiser.__init__

    def init(self: Denoiser, model: Any, config: Any = None) -> None:
        looks.append(model)
        look(self, model, config)

    monkeypatch.setattr(Denoiser, "__init__", init)
    ditfast.sample(new_dit(), [3], num_steps=2)
    assert len(looks) == 1
