"""A checkpoint that says what its model predicts is sampled as such, by every solver and scheduler, without being told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import small
from sampling_cli import checkpoint, draw
from support import error, randomize
from torch import Tensor

from ditfast import DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.checkpoints import CheckpointError
from ditfast.cli import main
from ditfast.diffusion import FlowMatching, GaussianDiffusion, steps
from ditfast.images import load_png
from ditfast.sampling import Sampler, image_noise, sample

CONFIG = DiTConfig(depth=2, hidden_size=32, num_heads=2, input_size=4, num_classes=5, learn_sigma=False, prediction="v")
LABELS = torch.tensor([1, 5, 2])

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(prediction: str) -> DiT:
    torch.manual_seed(0)
    model = randomize(DiT(dataclasses.replace(CONFIG, prediction=prediction))).eval()
    assert isinstance(model, DiT)
    return model


@torch.no_grad()
def plain_loop(model: DiT, num_steps: int) -> Tensor:
    """DDIM by hand, x0 and epsilon from the model's own prediction."""
    bars = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    times = GaussianDiffusion(str(num_steps)).timesteps
    x = image_noise(CONFIG.input_shape, [0, 1, 2], 0).double()
    for place in reversed(range(num_steps)):
        bar, before = bars[times[place]], bars[times[place - 1]] if place else torch.tensor(1.0)
        output = model(x.float(), torch.full((3,), float(times[place])), LABELS).double()
        x0 = {"v": bar.sqrt() * x - (1 - bar).sqrt() * output, "x0": output}[model.config.prediction]
        x = before.sqrt() * x0 + (1 - before).sqrt() * (x - bar.sqrt() * x0) / (1 - bar).sqrt()
    return x


@pytest.mark.parametrize("named", [False, True], ids=["epsilon's steps", "its own steps"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_the_sampler_reads_what_the_model_predicts(prediction: str, named: bool) -> None:
    model = tiny(prediction)
    options = {"prediction": prediction} if named else {}
    schedule = steps(GaussianDiffusion("6", learn_sigma=False, **options), "ddim")
    assert error(sample(model, schedule, LABELS), plain_loop(model, 6)) < 1e-5


def test_an_epsilon_model_takes_no_steps_of_another_prediction() -> None:
    model = tiny("epsilon")
    for prediction in ("v", "x0"):
        schedule = steps(GaussianDiffusion("4", learn_sigma=False, prediction=prediction), "ddim")
        with pytest.raises(ValueError, match=rf"^steps: got those of a model that predicts {prediction}, expected epsilon's"):
            sample(model, schedule, LABELS)
    assert sample(model, steps(FlowMatching(num_steps=4), "euler"), LABELS).isfinite().all()


def test_steps_of_a_flow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^steps: got those of a model that predicts velocity, expected v's"):
        Sampler(tiny("v"), steps(FlowMatching(num_steps=4), "euler"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("DDPMScheduler", {"clip_sample": False}),
        ("DPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scheduler_has_to_predict_what_the_model_does(name: str, options: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = tiny("v")

    def made(prediction_type: str) -> Any:
        scheduler = getattr(diffusers, name)(**options, prediction_type=prediction_type)
        scheduler.set_timesteps(5)
        return scheduler

    found = sample(model, [], LABELS, scheduler=made("v_prediction"))
    if name == "DDIMScheduler":
        scheduler, x = made("v_prediction"), image_noise(CONFIG.input_shape, [0, 1, 2], 0)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.expand(3).float(), LABELS), t, x).prev_sample
        assert error(found, x) < 1e-5
    with pytest.raises(ValueError, match=r"^scheduler: got prediction_type 'epsilon', expected 'v_prediction'.*from_config"):
        sample(model, [], LABELS, scheduler=made("epsilon"))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_an_epsilon_model_takes_no_scheduler_of_another_prediction(prediction_type: str) -> None:
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(5)
    message = rf"^scheduler: got prediction_type '{prediction_type}', expected 'epsilon'.*from_config"
    with pytest.raises(ValueError, match=message):
        Sampler(tiny("epsilon"), [], scheduler=scheduler)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_the_file_says_it(layout: str, tmp_path: Path) -> None:
    path = tmp_path / ("m.safetensors" if layout == "official" else "m")
    save_checkpoint(tiny("v"), path, layout=layout)
    loaded = load_checkpoint(path)
    assert loaded.config.prediction == "v"
    assert str(loaded.source).endswith(", predicts v")
    with pytest.raises(CheckpointError, match="config: got prediction 'epsilon' where the checkpoint says 'v'"):
        load_checkpoint(path, config=dataclasses.replace(CONFIG, prediction="epsilon"))


def test_a_file_that_does_not_say_it_means_epsilon(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, prediction="epsilon")
    assert "prediction" not in config.as_dict()  # as files were before there was a choice
    assert DiTConfig(**json.loads(json.dumps(config.as_dict()))) == config
    assert DiTConfig(**json.loads(json.dumps(CONFIG.as_dict()))) == CONFIG
    save_checkpoint(tiny("epsilon"), tmp_path / "m.safetensors")
    assert load_checkpoint(tmp_path / "m.safetensors").config.prediction == "epsilon"


@pytest.mark.parametrize("layout", ["official", "diffusers", "public", "state dict"])
def test_where_a_checkpoint_does_not_say_it_the_caller_does(layout: str, tmp_path: Path) -> None:
    path = tmp_path / ("m.safetensors" if layout == "official" else "m")
    model = tiny("epsilon")
    save_checkpoint(model, path, layout="official" if layout == "official" else "diffusers")
    if layout == "public":  # as diffusers writes it
        written = json.loads((path / "config.json").read_text())
        del written["_ditfast"]
        (path / "config.json").write_text(json.dumps(written))
    source = model.state_dict() if layout == "state dict" else path
    config = None if layout == "state dict" else load_checkpoint(path).config
    for given in (None, config, dataclasses.replace(config or CONFIG, prediction="v")):
        assert load_checkpoint(source, config=given, num_heads=2, prediction="v").config.prediction == "v"
    assert load_checkpoint(source, config=dataclasses.replace(config or CONFIG, prediction="v")).config.prediction == "v"
    assert load_checkpoint(source, num_heads=2).config.prediction == "epsilon"


@pytest.mark.parametrize("stated", ["epsilon", "v"])
def test_a_checkpoint_that_says_it_is_not_contradicted(stated: str) -> None:
    content = {"ema": tiny(stated).state_dict(), "config": {**CONFIG.as_dict(), "prediction": stated}}
    assert load_checkpoint(content, prediction=stated).config.prediction == stated
    for config in (None, CONFIG):
        with pytest.raises(CheckpointError, match=f"prediction: got 'x0', but the checkpoint says '{stated}'"):
            load_checkpoint(content, config=config, prediction="x0")
    with pytest.raises(CheckpointError, match=f"config: got prediction 'x0' where the checkpoint says '{stated}'"):
        load_checkpoint(content, config=dataclasses.replace(CONFIG, prediction="x0"))
    with pytest.raises(ValueError, match=r"^prediction: got 'noise', expected one of epsilon, x0, v"):
        load_checkpoint(content, prediction="noise")


def test_the_command_reads_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(in_channels=1, input_size=8, num_classes=10, prediction="v")
    path = checkpoint(tmp_path / "v.safetensors", config)
    out = tmp_path / "out"
    assert draw(out, "--checkpoint", str(path), "--classes", "3", "1", "--cfg", "2") == 0
    model = load_checkpoint(path)
    schedule = steps(GaussianDiffusion("ddim4", learn_sigma=config.learn_sigma, prediction="v"), "ddim")
    expected = sample(model, schedule, [3, 1], cfg_scale=2.0, clip=True)
    for k, image in enumerate(expected):
        drawn = torch.tensor(load_png(out / f"{k:06d}.png")).float().view(8, 8) / 127.5 - 1
        assert (drawn - image[0]).abs().max() < 1.01 / 127.5
    capsys.readouterr()
    arguments = ["sample", "--checkpoint", str(path), "--classes", "3", "--steps", "4", "--out", str(tmp_path / "flow")]
    assert main([*arguments, "--solver", "euler"]) == 2
    message = "--solver: got euler, but this model predicts v of a Gaussian diffusion, expected ddpm or ddim"
    assert message in capsys.readouterr().err


def test_conversion_says_that_others_would_take_it_for_epsilon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "v.safetensors", small(prediction="v"))
    assert main(["convert", str(path), str(tmp_path / "m.pt"), "--to", "official"]) == 0
    assert "prediction epsilon, not v" in capsys.readouterr().out
