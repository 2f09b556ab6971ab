"""Numbers that a sampler takes, at their edges and of every kind of integer and float; and those that it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import randomize
from torch import Tensor

from ditfast import DiT, DiTConfig
from ditfast.diffusion import FlowMatching, GaussianDiffusion, respaced_timesteps, steps
from ditfast.sampling import Sampler, image_noise, sample
from ditfast.training import RunOptions, TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5)
DDIM = steps(GaussianDiffusion("2"), "ddim")
FP32_MAX = torch.finfo(torch.float32).max


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    made = randomize(DiT(CONFIG)).eval()
    assert isinstance(made, DiT)
    return made


def images(model: DiT, labels: Any = (1, 5), **options: Any) -> Tensor:
    return sample(model, DDIM, labels, **options)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize(
    "labels",
    [
        [1, 5],
        (1, 5),
        range(1, 6, 4),
        [np.int64(1), np.uint8(5)],
        [torch.tensor(1), 5],
        np.array([1, 5], np.uint16),
        np.array([1, 5], np.int8),
        *(torch.tensor([1, 5], dtype=dtype) for dtype in INTEGERS),
        torch.tensor([[1, 0], [5, 0]])[:, 0],
    ],
    ids=str,
)
def test_labels_are_any_integers(labels: Any, model: DiT) -> None:
    assert torch.equal(images(model, labels), images(model, torch.tensor([1, 5])))


@pytest.mark.parametrize("labels", [[], (), np.array([], np.int64), torch.tensor([])], ids=str)
def test_no_labels_are_no_images(labels: Any, model: DiT) -> None:
    assert images(model, labels).shape == (0, 4, 4, 4)


@pytest.mark.parametrize(
    ("name", "same", "value"),
    [
        ("seed", 3, np.uint8(3)),
        ("seed", 3, torch.tensor(3)),
        ("seed", 2**64 - 1, np.uint64(2**64 - 1)),
        ("images", [2**64 - 1, 0], np.array([2**64 - 1, 0], np.uint64)),
        ("images", [3, 9], torch.tensor([3, 9], dtype=torch.int16)),
        ("images", [3, 9], (np.int32(3), 9)),
        ("cfg_scale", 2.0, np.float16(2)),
        ("cfg_scale", 2.0, 2),
        ("cfg_scale", 2.0, torch.tensor(2, dtype=torch.bfloat16)),
        ("cfg_scale", [2.0, 3.0], np.array([2, 3])),
        ("cfg_scale", 2.0, [2.0]),
        ("cfg_scale", [2.0, 3.0], torch.tensor([2.0, 3.0], dtype=torch.float64)),
        ("cfg_interval", (0.0, 500.0), [np.float32(0), 500]),
        ("table_bytes", 0, np.int64(0)),
        ("clip", True, np.bool_(True)),
        ("guidance_channels", 2, np.int64(2)),
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch_are_numbers(name: str, same: Any, value: Any, model: DiT) -> None:
    scale = {} if name == "cfg_scale" else {"cfg_scale": 3.0}
    assert torch.equal(images(model, **scale, **{name: value}), images(model, **scale, **{name: same}))


OUT_OF_RANGE: dict[str, list[Any]] = {
    "labels": [[1, 6], [-1, 0], [0.5, 1], [1.0, 2.0], [True, False], torch.tensor([True, False]), np.array([True, False])],
    "seed": [-1, 2**64, 1.5, 1.0, True, math.nan, np.float64(1), 10**400],
    "images": [[-1, 0], [2**64, 0], [0.5, 1], [True, 1], [1], [1, 2, 3], torch.tensor([0.5, 1])],
    "cfg_scale": [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400, np.float64(1e39), True, [1.0] * 3, [1.0, math.nan]],
    "cfg_interval": [(1.0, 0.0), (math.nan, 1.0), (0.0,), (0.0, 1.0, 2.0), (0.0, True)],
    "guidance_channels": [-1, 5, 2.0, True, math.nan],
    "table_bytes": [-1, 0.5, True, math.inf],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_range_is_named(name: str, model: DiT) -> None:
    for value in OUT_OF_RANGE[name]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
            images(model, **{name: value})


def test_the_ends_of_the_ranges_are_in_them(model: DiT) -> None:
    assert images(model, images=[0, 2**64 - 1], seed=2**64 - 1, cfg_interval=(-math.inf, math.inf)).isfinite().all()
    images(model, cfg_scale=FP32_MAX)
    assert images(model, cfg_scale=-2.0).isfinite().all()


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"device": "meta"}], ids=["fp64", "meta"])
def test_weights_that_nothing_samples_from_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^model: got weights of .*, expected float32, float16 or bfloat16 on a device with"):
        Sampler(DiT(CONFIG).eval().to(**change), DDIM)


def test_an_error_leaves_a_sampler_as_it_was(model: DiT) -> None:
    sampler = Sampler(model, DDIM, seed=3)
    expected = sampler([1, 5])
    for given in ({"labels": [9]}, {"labels": [1], "images": [-1]}, {"labels": [1], "cfg_scale": 1e39}):
        with pytest.raises(ValueError, match="got "):
            sampler(**given)
    assert torch.equal(sampler([1, 5]), expected)


# ------------------------------------------------------------------------------------------------ elsewhere
REFUSED: list[tuple[str, Callable[[Any], object], list[Any]]] = [
    ("step", lambda value: image_noise((2,), [0], 0, value), [-1, 2**64, 0.5]),
    ("shape", lambda value: image_noise(value, [0], 0), [(-1, 2), (1.5,)]),
    ("num_steps", lambda value: FlowMatching(num_steps=value), [0, -3, 2.0, True, math.nan, 10**6, 10**30]),
    ("respacing", respaced_timesteps, ["9" * 5000, "ddim" + "9" * 5000, "1e2", [True], [5.0], [10**30], []]),
    ("eta", lambda value: GaussianDiffusion().ddim_steps(value), [-0.1, 1.1, math.nan, math.inf, True]),
    ("last_step", lambda value: FlowMatching().sde_steps(last_step=value), [0, 1, math.nan, -1]),
    ("diffusion_norm", lambda value: FlowMatching().sde_steps(diffusion_norm=value), [-1, math.nan, math.inf, 1e39]),
    *(
        (name, lambda value, name=name: TrainSettings(**{"steps": 4, "batch": 8, name: value}), refused)  # type: ignore[misc]
        for name, refused in {
            "steps": [0, -1, 2.0, True, 10**30],
            "batch": [0, 1.5],
            "seed": [-1, 2**64, 0.5],
            "rate": [-1e-4, math.nan, math.inf, 1e39, True],
            "weight_decay": [-1, math.inf],
            "max_norm": [0, -1, math.nan, math.inf, True],
            "ema": [(1.0,), (-0.1,), (math.nan,), (True,), ()],
            "warm_up": [-1, 0.5, 10**5000],
            "max_skipped": [-1, math.nan],
        }.items()
    ),
    ("save_every", lambda value: RunOptions(save_every=value), [0, 1.0, True, 10**30]),
]


@pytest.mark.parametrize(("name", "call", "refused"), [pytest.param(*case, id=case[0]) for case in REFUSED])
def test_numbers_are_refused_by_name(name: str, call: Callable[[Any], object], refused: list[Any]) -> None:
    for value in refused:
        with pytest.raises(ValueError, match=f"^{name}: got "):
            call(value)


def test_settings_of_numpy_are_settings() -> None:
    given = {
        "steps": np.int64(4),
        "batch": np.uint8(8),
        "rate": np.float32(0.5),
        "ema": np.array([0.5]),
        "flip": np.bool_(True),
    }
    settings = TrainSettings(**given)  # type: ignore[arg-type]
    assert settings == TrainSettings(steps=4, batch=8, rate=0.5, ema=(0.5,))
    assert {type(settings.steps), type(settings.rate), type(settings.flip)} == {int, float, bool}
    assert RunOptions(keep=np.int64(3)) == RunOptions(keep=3)  # type: ignore[arg-type]


def test_a_config_of_numpy_is_a_config() -> None:
    given: dict[str, Any] = {"depth": np.int64(2), "input_size": (np.int32(4), 8), "mlp_ratio": np.float32(2.5)}
    config = DiTConfig(**given, learn_sigma=np.bool_(True), class_dropout_prob=np.float64(0))  # type: ignore[arg-type]
    assert config == DiTConfig(depth=2, input_size=(4, 8), mlp_ratio=2.5, learn_sigma=True, class_dropout_prob=0)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["mlp_ratio"] == 2.5


@pytest.mark.parametrize("dtype", INTEGERS[:4])
def test_timesteps_are_any_integers(dtype: torch.dtype) -> None:
    x, noise = torch.randn(2, 2, 1, 4, 4)
    process = GaussianDiffusion([3, 100])
    expected = process.add_noise(x, torch.tensor([3, 100]), noise)
    assert torch.equal(process.add_noise(x, torch.tensor([3, 100], dtype=dtype), noise), expected)
    with pytest.raises(ValueError, match=r"^t: got torch.bool"):
        process.add_noise(x, torch.tensor([True, False]), noise)


def test_noise_of_another_shape_is_refused() -> None:
    x = torch.randn(2, 1, 4, 4)
    for call in (
        lambda noise: GaussianDiffusion().add_noise(x, torch.tensor([1, 2]), noise),
        lambda noise: FlowMatching().add_noise(x, torch.tensor([0.1, 0.2]), noise),
        lambda noise: GaussianDiffusion(learn_sigma=False).ddpm_step(x, x, torch.tensor([1, 2]), noise=noise),
    ):
        with pytest.raises(ValueError, match=r"^noise: got shape \(1, 1, 4, 4\)"):
            call(torch.randn(1, 1, 4, 4))
