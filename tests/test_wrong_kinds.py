"""Arguments of the wrong kind: each public function's every argument, and an error that names it."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vae import tiny as tiny_vae
from torch import nn

import ditfast
from ditfast import DiT, DiTConfig, diffusion, evaluation, flops, images, reference, sampling, vae
from ditfast.diffusion import FlowMatching, GaussianDiffusion, Update
from ditfast.evaluation import ImageSet
from ditfast.training import RunOptions, Trainer, TrainSettings

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5)
KINDS: dict[str, object] = {
    "None": None,
    "a list": [object()],
    "a dict": {},
    "a text": "no such thing",
    "a fraction": 1.5,
    "an array": np.zeros((2, 2)),
    "integers": torch.zeros(3, dtype=torch.int64),
    "a config": CONFIG,
    "a module": nn.Linear(1, 1),
    "a function": lambda *arguments, **options: None,
    "a class": DiT,
}
FUNCTIONS = {"a module", "a function", "a class"}
# Kinds that an argument of this name, or of this function, may have; None is right for each whose default it is.
RIGHT: dict[str, set[str]] = {
    "Inception.weights": {"None", "a text"},
    "Sampler.model": {"a module", "a function"},  # which a config has to describe
    "callback": FUNCTIONS,
    "cfg_scale": {"a fraction"},
    "config": {"a config"},
    "decode": FUNCTIONS,
    "device": {"a text"},
    "diffusion_norm": {"a fraction"},
    "features_a": {"an array"},
    "features_b": {"an array"},
    "gaussian.features": {"an array"},
    "image_noise.images": {"integers"},
    "labels": {"integers"},
    "max_norm": {"a fraction"},
    "model_or_pipeline": {"a module"},
    "on_batch": FUNCTIONS,
    "on_step": FUNCTIONS,
    "out": {"a text"},
    "path": {"a text"},
    "prefix": {"a text"},
    "path_or_state_dict": {"a dict", "a text"},
    "rate": {"a fraction"},
    "respacing": {"None"},
    "sample.model": {"a module", "a function"},
    "sample.vae": {"a text"},
    "scaling_factor": {"a fraction"},
    "shape": {"integers"},
    "shift_factor": {"a fraction"},
    "source": {"a text"},
    "training_losses.model": {"a module", "a class"},  # called, and refused for what they return if not before
    "weight_decay": {"a fraction"},
}
OTHER_NAMES = {"name": "betas"}  # of the one word that betas() takes, as GaussianDiffusion calls it
MODELS_OWN = {"y"}  # which a model of anybody's is given as it came


class Records:
    """Data without records."""

    input_shape = CONFIG.input_shape
    num_classes = CONFIG.num_classes
    fingerprint = "none"

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> object:
        raise AssertionError

    def clean(self, *arguments: object) -> object:
        raise AssertionError


Cases = list[tuple[Callable[..., object], dict[str, Any]]]


def of_models() -> Cases:
    model = DiT(CONFIG).eval()
    return [
        (ditfast.accelerate, {"model_or_pipeline": model}),
        (ditfast.acceleration_report, {"model_or_pipeline": model}),
        (ditfast.restore, {"model_or_pipeline": model}),
        (ditfast.load_checkpoint, {"path_or_state_dict": model.state_dict(), "config": CONFIG}),
        (ditfast.save_checkpoint, {"model": model, "path": Path("nowhere/x.pt")}),
        (DiT, {"config": CONFIG}),
        (reference.DiT, {"config": CONFIG}),
    ]


def of_flops() -> Cases:
    work = {"config": CONFIG, "batch": 2, "dtype": torch.float32, "plan": "keep"}
    return [
        (flops.macs, {"config": CONFIG}),
        (flops.flops, {"config": CONFIG}),
        (flops.parameters, {"config": CONFIG}),
        (flops.activation_bytes, work),
        (flops.training_bytes, work),
        (flops.operations, work),
        (flops.floor_ms, work | {"device": flops.DEVICES["H100"]}),
    ]


def of_images() -> Cases:
    path, pixels = Path(tempfile.gettempdir(), "refused"), np.zeros((2, 4, 4, 3), np.uint8)
    return [
        (images.to_pixels, {"images": torch.zeros(2, 3, 4, 4)}),
        (images.from_pixels, {"pixels": pixels}),
        (images.labelled_grid, {"rows": {1: torch.zeros(2, 3, 4, 4)}}),
        (images.save_png, {"path": path, "pixels": pixels[0]}),
        (images.load_png, {"path": path}),
        (images.save_npz, {"path": path, "images": pixels, "labels": [1, 2]}),
    ]


def of_sampling() -> Cases:
    model, schedule = DiT(CONFIG).eval(), diffusion.steps(GaussianDiffusion("2"), "ddim")
    given = {"model": model, "steps": schedule}
    return [
        (ditfast.sample, {"model": model, "labels": [1, 2], "num_steps": 2}),
        (sampling.sample, given | {"labels": [1, 2]}),
        (sampling.Sampler, given),
        (sampling.Sampler(**given).__call__, {"labels": [1, 2]}),
        (sampling.image_noise, {"shape": (4, 4), "images": [1, 2], "seed": 0}),
    ]


def of_diffusion() -> Cases:
    x, noise, output = torch.randn(3, 2, 4, 4, 4)
    t, times = torch.tensor([5, 900]), torch.tensor([0.25, 0.5])
    gaussian, flow = GaussianDiffusion(learn_sigma=False), FlowMatching()
    stepped = {"model_output": output, "x": x, "t": t, "noise": noise}
    trained = {"model": lambda x, t, y: x, "x0": x, "y": torch.tensor([1, 2]), "noise": noise}
    return [
        (diffusion.steps, {"process": gaussian, "solver": "ddim"}),
        (diffusion.betas, {"name": "linear"}),
        (diffusion.respaced_timesteps, {"respacing": "250"}),
        (diffusion.apply_update, {"x": x, "output": output, "noise": noise, "update": Update(1, 1, 1, 1, 0, 0)}),
        (GaussianDiffusion, {}),
        (gaussian.ddim_steps, {}),
        (gaussian.add_noise, {"x0": x, "t": t, "noise": noise}),
        (gaussian.mean_variance, {"model_output": output, "x": x, "t": t}),
        (gaussian.ddpm_step, stepped),
        (gaussian.ddim_step, stepped | {"eta": 1.0}),
        (gaussian.training_losses, trained | {"t": t}),
        (FlowMatching, {}),
        (flow.sde_steps, {}),
        (flow.add_noise, {"x0": x, "t": times, "noise": noise}),
        (flow.score, {"velocity": output, "x": x, "t": times}),
        (flow.velocity, {"score": output, "x": x, "t": times}),
        (flow.training_losses, trained | {"t": times}),
    ]


def of_training() -> Cases:
    given = {
        "model": DiT(CONFIG),
        "data": Records(),
        "settings": TrainSettings(steps=1, batch=8),
        "out": Path(os.devnull, "run"),
    }
    return [(TrainSettings, {"steps": 1}), (RunOptions, {}), (Trainer, given), (Trainer(**given).run, {})]


def of_evaluation() -> Cases:
    images = ImageSet("nothing", (9, 8, 8, 1), None, lambda size: iter(()))
    features = torch.randn(9, 2)
    return [
        (evaluation.compare, {"images": images, "reference": images, "inception": SimpleNamespace(features=print)}),
        (evaluation.compare_with_digits, {"images": images}),
        (evaluation.open_images, {"path": "nowhere"}),
        (evaluation.Inception, {"weights": None, "device": "cpu"}),
        (evaluation.gaussian, {"features": features}),
        (evaluation.frechet_distance, {"features_a": features, "features_b": features}),
        (evaluation.precision_recall, {"features": features, "reference": features}),
        (evaluation.inception_score, {"probabilities": features.softmax(1)}),
    ]


def of_vae() -> Cases:
    given, x = {"vae": tiny_vae().eval()}, torch.randn(2, 4, 4, 4)
    return [
        (vae.load_vae, {"source": "nowhere"}),
        (vae.decode, given | {"latents": x}),
        (vae.encode_moments, given | {"images": x[:, :3]}),
        (vae.draw_latents, {"moments": torch.cat([x, x], 1), "noise": x, "scaling_factor": 1, "shift_factor": 0}),
        (vae.check_channels, given | {"channels": 4}),
        (vae.scaling, given),
        (vae.image_size, given | {"latent_size": 4}),
        (vae.latent_shape, given | {"pixels": 8}),
    ]


GROUPS = [of_models, of_flops, of_images, of_sampling, of_diffusion, of_training, of_evaluation, of_vae]


def why_wrong(function: Callable[..., object], given: Mapping[str, Any], name: str) -> str:
    """Empty if the function refuses an argument by its name."""
    try:
        function(**given)
    except (TypeError, ValueError) as error:
        return "" if str(error).startswith(f"{name}: got ") else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_a_wrong_kind_is_refused_by_the_arguments_name(group: Callable[[], Cases], one_thread: None) -> None:
    faults, calls = [], 0
    for function, given in group():
        for name, parameter in inspect.signature(function).parameters.items():
            if name in MODELS_OWN or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            right = (
                RIGHT.get(name, set())
                | RIGHT.get(f"{function.__name__}.{name}", set())
                | ({"None"} if parameter.default is None else set())
            )
            for kind, value in KINDS.items():
                if kind not in right:
                    calls += 1
                    why = why_wrong(function, {**given, name: value}, OTHER_NAMES.get(name, name))
                    faults += [f"{function.__qualname__}: {name} as {kind}: {why}"] if why else []
    assert not faults, f"{len(faults)} of {calls}:\n" + "\n".join(faults)


def test_every_public_function_is_asked() -> None:
    asked = {function.__qualname__ for group in GROUPS for function, _ in group()}
    records = {
        "ImageSet",
        "Report",
        "Samples",
        "Score",
        "Step",
        "Update",
        "EvaluationError",
        "Gaussian",
    }
    records |= {"DeviceSpec", "Op", "TrainingBytes", "add_arguments", "run"}
    for module in (sampling, diffusion, evaluation, flops):
        public = {name for name in module.__all__ if callable(getattr(module, name))}
        assert public - records <= asked, public - records - asked


@pytest.mark.parametrize(("function", "wrong"), [(f, w) for f in (flops.macs, DiT, reference.DiT) for w in ("model", "name")])
def test_a_model_or_a_name_in_place_of_its_config_says_what_to_pass(function: Callable[..., object], wrong: str) -> None:
    given, hint = {"model": (DiT(CONFIG), "pass model.config"), "name": ("DiT-S/2", "DiTConfig.from_name")}[wrong]
    with pytest.raises(TypeError, match=f"config: got .*, expected a ditfast.DiTConfig.*{hint}"):
        function(given)


def test_a_tensor_on_another_device_is_refused_by_its_name() -> None:
    model, names = DiT(CONFIG).eval(), set()
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([5, 900]), torch.tensor([1, 2])
    model_calls: Cases = [
        (model, {"x": x, "t": t, "y": y}),
        (model.modulation_vectors, {"t": t, "y": y}),
        (model.forward_modulated, {"x": x, "vectors": model.modulation_vectors(t, y)}),
    ]
    for function, given in [*of_diffusion(), *model_calls]:
        for name, value in given.items():
            if not isinstance(value, torch.Tensor) or (name in MODELS_OWN and function is not model):
                continue
            names.add(name)
            with pytest.raises(ValueError, match=r": got a tensor on (cpu|meta), expected (cpu|meta), as") as error:
                function(**{**given, name: value.to("meta")})
            # The other arguments are held to x, wherever it is.
            assert str(error.value).startswith(f"{name}: ") or name in ("x", "x0"), (function, name)
    assert {"x", "x0", "t", "y", "noise", "model_output", "output", "velocity", "vectors"} <= names


def test_paths_may_be_text(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    images.save_png(f"{tmp_path}/1.png", pixels)
    images.save_npz(f"{tmp_path}/1.npz", [pixels], torch.tensor([7]))
    np.testing.assert_array_equal(images.load_png(f"{tmp_path}/1.png"), pixels)
    for name in ("", "/1.npz"):
        assert evaluation.open_images(f"{tmp_path}{name}").shape == (1, 4, 4, 3)
