"""Every file says what its model was trained for, or its kind of checkpoint does, and sampling goes by it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import known_width, saved, small, weights_of
from safetensors import safe_open
from support import randomize
from tiny_vae import tiny as tiny_vae

import ditfast
from ditfast import CheckpointError, DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.checkpoints import CheckpointSource
from ditfast.checkpoints.source import training_of
from ditfast.checkpoints.trained_for import LatentScale, TrainedFor
from ditfast.class_names import ClassNameError
from ditfast.cli import main
from ditfast.diffusion import FlowMatching, GaussianDiffusion, steps
from ditfast.sampling import sample
from ditfast.vae import VAEError, scaling

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("otter", "golden retriever", "macaw", "2")
PIXELS = small(in_channels=1, num_classes=4)
FLOW = TrainedFor("velocity", "gvp", False, "flow", (8, 8), None, NAMES, 7, stated=True)
LATENT = TrainedFor("v", "cosine", False, "mse", (64, 64), LatentScale(0.25, 0.5), None, 3, stated=True)
PUBLIC = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def told(trained_for: TrainedFor, config: DiTConfig = PIXELS) -> DiT:
    """A model whose source has the record."""
    torch.manual_seed(0)
    model = randomize(DiT(dataclasses.replace(config, prediction=trained_for.prediction))).eval()
    assert isinstance(model, DiT)
    model.source = CheckpointSource(None, "official", "unnamed", "", trained_for)
    return model


def record_of(model: DiT) -> TrainedFor:
    assert model.source is not None
    return model.source.trained_for


@pytest.mark.parametrize(("trained_for", "config"), [(FLOW, PIXELS), (LATENT, small())], ids=["flow", "v of latents"])
def test_every_layout_keeps_it_through_conversions(trained_for: TrainedFor, config: DiTConfig, tmp_path: Path) -> None:
    save_checkpoint(told(trained_for, config), tmp_path / "a.safetensors")
    for before, after, layout in (("a.safetensors", "b.pt", "official"), ("b.pt", "c", "diffusers"), ("c", "d.pt", "official")):
        assert main(["convert", str(tmp_path / before), str(tmp_path / after), "--to", layout]) == 0
    for name in ("a.safetensors", "b.pt", "c", "d.pt"):
        model = load_checkpoint(tmp_path / name)
        assert record_of(model) == trained_for
        assert model.config.prediction == trained_for.prediction
    model.save_pretrained(tmp_path / "e")
    assert record_of(DiT.from_pretrained(tmp_path / "e")) == trained_for
    assert record_of(load_checkpoint(torch.load(tmp_path / "d.pt", weights_only=True))) == trained_for


def test_a_model_that_nobody_described_says_nothing(tmp_path: Path) -> None:
    save_checkpoint(DiT(small()), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.metadata()) == {"config", "format"}
    assert record_of(load_checkpoint(tmp_path / "x.safetensors")) == TrainedFor()


def test_the_digits_say_it() -> None:
    expected = TrainedFor(loss="hybrid", image_size=(8, 8), class_names=tuple("0123456789"), step=5000, stated=True)
    assert record_of(ditfast.load_digits()) == expected


def test_other_classes_and_sizes_leave_behind_what_no_longer_holds(tmp_path: Path) -> None:
    save_checkpoint(told(FLOW), tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="label table"):
        changed = load_checkpoint(tmp_path / "x.pt", num_classes=9, input_size=16)
    assert record_of(changed) == dataclasses.replace(FLOW, class_names=None, image_size=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "noise"}, "trained_for.prediction: got 'noise', expected one of velocity, epsilon, x0, v"),
        ({"image_size": [8]}, "trained_for.image_size: got .*, expected a height and a width"),
        ({"class_names": [1, 2]}, "trained_for.class_names: got .*, expected a list of names"),
        ({"latent_scale": {"scaling_factor": 0}}, "trained_for.latent_scale: got a dict, expected finite numbers"),
        ({"step": -1}, "trained_for.step: got -1, expected a number of steps"),
        ({"learned_variance": 1}, "trained_for.learned_variance: got 1, expected true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_record_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_checkpoint(told(FLOW), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["trained_for"] |= change
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(content)


def test_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    save_checkpoint(told(FLOW), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["trained_for"] |= {"optimizer": "muon"}
    assert record_of(load_checkpoint(content)) == FLOW


# ------------------------------------------------------------------------------------------------ kinds of checkpoints
def sit_arguments(**changed: str) -> dict[str, object]:
    arguments = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", **changed}
    return {"ema": weights_of(known_width()), "args": argparse.Namespace(**arguments)}


@pytest.mark.parametrize(
    ("content", "name", "prediction", "schedule"),
    [
        (weights_of(known_width()), "DiT-XL-2-256x256.pt", "epsilon", "linear"),
        (weights_of(known_width()), "transit.pt", "epsilon", "linear"),
        (weights_of(known_width()), "SiT-XL-2-256.pt", "velocity", "linear"),
        (weights_of(known_width()), "my_sit.pt", "velocity", "linear"),
        (sit_arguments(), "0400000.pt", "velocity", "linear"),
        (sit_arguments(path_type="GVP"), "0400000.pt", "velocity", "gvp"),
        (sit_arguments(prediction="noise"), "0400000.pt", "epsilon", "linear"),
    ],
    ids=["DiT", "a name like it", "SiT by name", "sit by name", "SiT's arguments", "SiT's GVP", "SiT of noise"],
)
def test_official_files_are_told_by_their_kind(
    content: dict[str, Any], name: str, prediction: str, schedule: str, tmp_path: Path
) -> None:
    path = saved(content, tmp_path / name)
    learned = prediction == "epsilon"
    for config in (None, known_width()):  # which says nothing of the prediction
        model = load_checkpoint(path, config=config)
        assert model.config.prediction == prediction
        assert record_of(model) == TrainedFor(prediction, schedule, learned)
    assert load_checkpoint(path, prediction="x0").config.prediction == "x0"


@pytest.mark.parametrize("place", ["scheduler", "transformer"])
def test_a_pipelines_scheduler_says_it(place: str, tmp_path: Path) -> None:
    model = told(TrainedFor(), small())
    model.source = None
    save_checkpoint(model, folder := tmp_path / "transformer", layout="diffusers")
    written = json.loads((folder / "config.json").read_text())
    del written["_ditfast"]  # as diffusers writes it
    (folder / "config.json").write_text(json.dumps(written))
    (tmp_path / place).mkdir(exist_ok=True)
    file = tmp_path / place / "scheduler_config.json"
    expected = TrainedFor("v", "cosine")
    file.write_text(json.dumps(PUBLIC))
    for path in (tmp_path, folder):
        assert record_of(load_checkpoint(path)) == expected
        assert load_checkpoint(path).config.prediction == "v"
    assert main(["convert", str(tmp_path), str(tmp_path / "x.pt"), "--to", "official"]) == 0
    assert record_of(load_checkpoint(tmp_path / "x.pt")) == dataclasses.replace(expected, stated=True)
    file.write_text(json.dumps({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}))
    with pytest.raises(ValueError, match=r"^solver: got ddpm, but this model was trained with the schedule 'scaled_linear"):
        ditfast.sample(load_checkpoint(tmp_path), [1], num_steps=2)


# ------------------------------------------------------------------------------------------------ sampling
def test_a_flow_is_sampled_as_one(tmp_path: Path) -> None:
    save_checkpoint(told(FLOW), tmp_path / "x.safetensors")
    model = load_checkpoint(tmp_path / "x.safetensors")
    samples = ditfast.sample(model, ["Otter", "macaw", "2"], num_steps=3, cfg_scale=2.0)
    expected = sample(model, steps(FlowMatching("gvp", 3), "euler"), [0, 2, 3], cfg_scale=2.0, clip=True)
    assert torch.equal(samples.latents, expected)
    assert (samples.settings["solver"], samples.labels.tolist()) == ("euler", [0, 2, 3])
    for solver in ("ddpm", "ddim"):
        with pytest.raises(ValueError, match=rf"^solver: got {solver}, but .* a velocity .*, expected euler, heun or sde; to"):
            ditfast.sample(model, [1], solver=solver, num_steps=2)
    insisting = dataclasses.replace(model.config, prediction="epsilon")
    assert ditfast.sample(model, [1], solver="ddim", num_steps=2, config=insisting).settings["solver"] == "ddim"
    with pytest.raises(ValueError, match=r"^steps: got those of a model that predicts epsilon, expected velocity's"):
        sample(model, steps(GaussianDiffusion("2"), "ddim"), [1])


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_the_digits_are_no_flow(solver: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ditfast.load_digits()
    with pytest.raises(
        ValueError, match=rf"^solver: got {solver}, but this model predicts the noise .*, expected ddpm or ddim;"
    ):
        ditfast.sample(model, [1], solver=solver, num_steps=2)
    insisting = dataclasses.replace(model.config, prediction="velocity")
    assert ditfast.sample(model, [1], solver=solver, num_steps=2, config=insisting).settings["solver"] == solver
    command = ["sample", "--classes", "1", "--per-class", "1", "--steps", "2", "--solver", solver, "--out"]
    assert main([*command, str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert "predicts the noise of a Gaussian diffusion, expected ddpm or ddim; --force-solver insists" in said
    assert said.count("\n") == 1
    assert main([*command, str(tmp_path / "b"), "--force-solver"]) == 0


def test_the_command_draws_a_flow_as_one_by_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(told(FLOW), tmp_path / "x.pt")
    command = ["sample", "--checkpoint", str(tmp_path / "x.pt"), "--steps", "2", "--classes", "golden retriever", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0
    assert "1 images, euler, 2 steps" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "b"), "--solver", "ddim"]) == 2
    assert "expected euler, heun or sde; --force-solver insists" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "c"), "--solver", "ddim", "--force-solver"]) == 0


def test_an_untrained_variance_is_not_read(tmp_path: Path) -> None:
    save_checkpoint(told(dataclasses.replace(FLOW, prediction="epsilon", schedule="cosine", loss="mse")), tmp_path / "x.pt")
    model = load_checkpoint(tmp_path / "x.pt")
    schedule = steps(GaussianDiffusion("3", "cosine", learn_sigma=False), "ddpm")
    assert torch.equal(ditfast.sample(model, [1], num_steps=3, cfg_scale=1.0).latents, sample(model, schedule, [1], clip=True))


def test_a_model_without_a_file_is_what_its_solver_says() -> None:
    model = DiT(small()).eval()
    assert ditfast.sample(model, [1], solver="heun", num_steps=2).settings["solver"] == "heun"
    with pytest.raises(ValueError, match=r"^solver: got ddim, but this model predicts a velocity"):
        ditfast.sample(DiT(small(prediction="velocity")).eval(), [1], solver="ddim", num_steps=2)


def test_names_are_those_of_the_checkpoint() -> None:
    with pytest.raises(ClassNameError, match=r"^labels: got 'oter', which no class is called; close are 'otter'"):
        ditfast.sample(told(FLOW), ["oter"], num_steps=2)
    with pytest.raises(TypeError, match=r"^labels: got .*, expected integers, as the checkpoint has no class names"):
        ditfast.sample(told(LATENT, small()), ["otter"], num_steps=2)


def test_latents_have_the_scale_of_the_training() -> None:
    pytest.importorskip("diffusers")
    vae = tiny_vae().eval()
    config = small(input_size=8)
    size = ditfast.vae.image_size(vae, 8)
    trained_for = dataclasses.replace(LATENT, image_size=(size, size))
    with pytest.warns(UserWarning, match=r"^vae: scales latents by .*, but the model was trained on those by 0.25 after"):
        samples = ditfast.sample(told(trained_for, config), [1], num_steps=2, vae=vae)
    assert scaling(vae) != {"scaling_factor": 0.25, "shift_factor": 0.5}  # the caller's stays as it is
    vae.register_to_config(scaling_factor=0.25, shift_factor=0.5)
    assert (samples.images == ditfast.sample(told(trained_for, config), [1], num_steps=2, vae=vae).images).all()
    with pytest.raises(VAEError, match=rf"^vae: decodes to {size} x {size} pixels, but the model was trained for 512 x 512"):
        ditfast.sample(told(dataclasses.replace(LATENT, image_size=(512, 512)), config), [1], num_steps=2, vae=vae)


def test_another_prediction_leaves_the_data_of_the_training() -> None:
    model = told(dataclasses.replace(LATENT, class_names=NAMES), small(num_classes=4))
    config = dataclasses.replace(model.config, prediction="velocity")
    record = training_of(model.source, config)
    assert (record.prediction, record.schedule, record.loss) == ("velocity", "linear", None)
    assert (record.latent_scale, record.image_size, record.class_names) == (LATENT.latent_scale, (64, 64), NAMES)


def test_a_velocity_is_not_given_to_diffusers_schedulers() -> None:
    scheduler = pytest.importorskip("diffusers").DDIMScheduler()
    with pytest.raises(ValueError, match=r"^scheduler: got a DDIMScheduler, expected none of diffusers'.*solver='euler'"):
        ditfast.sample(told(FLOW), [1], scheduler=scheduler, num_steps=2)
