"""``ditfast.sample``: defaults, beginning in the middle, callbacks, generators, batches, and what comes back."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import error, randomize
from tiny_vae import saved, tiny
from torch import Tensor

import ditfast
from ditfast import DiT, DiTConfig
from ditfast.cli import main
from ditfast.diffusion import FlowMatching, GaussianDiffusion, steps
from ditfast.images import load_png, to_pixels
from ditfast.sampling import Samples, image_noise
from ditfast.sampling import sample as sample_steps
from ditfast.vae import decode

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=5)
PIXELS = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=8, in_channels=3, num_classes=5)
LABELS = [0, 3, 4]
SCHEDULERS = {"DDIMScheduler": {"clip_sample": False}, "EulerDiscreteScheduler": {}, "HeunDiscreteScheduler": {}}


class Seen(NamedTuple):
    step: int
    time: float
    latents: Tensor


class Watcher:
    """A callback that notes what it saw."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def __call__(self, step: int, time: float, latents: Tensor) -> None:
        self.seen.append(Seen(step, time, latents))


def new_dit(config: DiTConfig = CONFIG) -> DiT:
    model = randomize(DiT(config)).eval()
    assert isinstance(model, DiT)
    return model


def new_scheduler(name: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(num_train_timesteps=100, **SCHEDULERS[name])


# ------------------------------------------------------------------------------------------------ defaults
def test_the_digits_have_defaults_of_their_own() -> None:
    model = ditfast.load_digits()
    expected = sample_steps(model, steps(GaussianDiffusion("ddim50"), "ddim"), LABELS, cfg_scale=2.0, clip=True)
    samples = ditfast.sample(model, LABELS)
    assert torch.equal(samples.latents, expected)
    assert samples.labels.tolist() == LABELS
    assert samples.settings["solver"] == "ddim"


@pytest.mark.parametrize(
    ("given", "schedule", "scale"),
    [
        ({"num_steps": 3}, steps(GaussianDiffusion("3"), "ddpm"), 4.0),
        ({"num_steps": "ddim5"}, steps(GaussianDiffusion("ddim5"), "ddim"), 4.0),
        ({"num_steps": "2,1", "solver": "ddim", "cfg_scale": 1}, steps(GaussianDiffusion("2,1"), "ddim"), 1.0),
        ({"num_steps": 3, "solver": "heun"}, steps(FlowMatching(num_steps=3), "heun"), 4.0),
        ({"num_steps": 3, "solver": "sde", "cfg_scale": 2.0}, steps(FlowMatching(num_steps=3), "sde"), 2.0),
    ],
    ids=["ddpm", "ddim5", "ddim 2,1", "heun", "sde"],
)
def test_solver_and_steps_are_those_asked_for(given: dict[str, Any], schedule: list[Any], scale: float) -> None:
    model = new_dit()
    expected = sample_steps(model, schedule, LABELS, cfg_scale=scale, seed=7)
    assert torch.equal(ditfast.sample(model, LABELS, seed=7, **given).latents, expected)


def test_a_model_without_a_null_class_is_not_guided() -> None:
    model = new_dit(DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5, class_dropout_prob=0))
    assert ditfast.sample(model, LABELS, num_steps=2).settings["cfg_scale"] == 1.0


def test_without_a_number_of_steps_there_are_250() -> None:
    watcher = Watcher()
    tiny = DiTConfig(depth=1, hidden_size=8, num_heads=1, input_size=2, num_classes=5)
    ditfast.sample(new_dit(tiny), [1], callback=watcher)
    assert len(watcher.seen) == 250


def test_the_command_draws_the_same_images(tmp_path: Path) -> None:
    assert main(["sample", "--classes", "3", "7", "--per-class", "1", "--out", str(tmp_path)]) == 0
    images = ditfast.sample(ditfast.load_digits(), [3, 7]).images
    for i, image in enumerate(images):
        assert (load_png(tmp_path / f"{i:06d}.png") == image[..., :1]).all()


# ------------------------------------------------------------------------------------------------ beginning in the middle
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "heun", "sde"])
def test_a_run_from_what_a_callback_saw_ends_in_the_bits_of_the_whole(solver: str) -> None:
    model, watcher = new_dit(), Watcher()
    given: dict[str, Any] = {"solver": solver, "num_steps": 6, "cfg_scale": 3.0}
    whole = ditfast.sample(model, LABELS, callback=watcher, **given).latents
    assert [seen.step for seen in watcher.seen] == list(range(6))
    assert torch.equal(watcher.seen[0].latents, image_noise(CONFIG.input_shape, range(3), 0))
    for step, time, latents in watcher.seen:
        rest = Watcher()
        part = ditfast.sample(model, LABELS, latents=latents, start_time=time, callback=rest, **given)
        assert torch.equal(part.latents, whole)
        assert [seen.step for seen in rest.seen] == list(range(step, 6))


def test_it_does_so_without_the_table_and_one_image_at_a_time() -> None:
    model, watcher = new_dit(), Watcher()
    model.register_forward_hook(lambda module, given, out: 0.9 * out)
    given: dict[str, Any] = {"solver": "ddim", "num_steps": 5, "batch_invariant": True}
    whole = ditfast.sample(model, [3], callback=watcher, **given).latents
    _, time, latents = watcher.seen[2]
    assert torch.equal(ditfast.sample(model, [3], latents=latents, start_time=time, **given).latents, whole)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_without_history_begins_in_the_middle(name: str) -> None:
    model, watcher, scheduler = new_dit(), Watcher(), new_scheduler(name)
    whole = ditfast.sample(model, LABELS, scheduler=scheduler, num_steps=6, callback=watcher).latents
    assert [seen.step for seen in watcher.seen] == list(range(6))
    for _, time, latents in watcher.seen:
        part = ditfast.sample(model, LABELS, scheduler=scheduler, num_steps=6, latents=latents, start_time=time)
        assert error(part.latents, whole) < 1e-6


def test_a_scheduler_whose_history_knows_no_middle_is_refused() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(5)
    time = float(scheduler.timesteps[3])
    with pytest.raises(ValueError, match=r"^start_time: got one, but a PNDMScheduler has a history"):
        ditfast.sample(new_dit(), LABELS, scheduler=scheduler, latents=NOISE, start_time=time)


def test_latents_alone_are_the_first_noise() -> None:
    model, noise = new_dit(), image_noise(CONFIG.input_shape, range(3), 5)
    expected = ditfast.sample(model, LABELS, num_steps="ddim5", seed=5).latents
    assert torch.equal(ditfast.sample(model, LABELS, num_steps="ddim5", latents=noise.double()).latents, expected)


# ------------------------------------------------------------------------------------------------ callbacks
def test_a_callback_changes_the_latents() -> None:
    model = new_dit()
    plain = ditfast.sample(model, LABELS, num_steps="ddim5").latents
    noise = image_noise(CONFIG.input_shape, range(3), 5)
    other = ditfast.sample(model, LABELS, num_steps="ddim5", latents=noise).latents
    found = ditfast.sample(model, LABELS, num_steps="ddim5", callback=lambda i, t, x: noise if i == 0 else None).latents
    assert torch.equal(found, other)
    assert not torch.equal(found, plain)
    in_place = ditfast.sample(model, LABELS, num_steps="ddim5", callback=lambda i, t, x: (x.copy_(noise), None)[1])
    assert torch.equal(in_place.latents, plain)


def test_latents_that_a_callback_keeps_stay_what_they_were() -> None:
    model, copies, watcher = new_dit(), [], Watcher()

    def callback(step: int, time: float, latents: Tensor) -> None:
        watcher(step, time, latents)
        copies.append(latents.clone())

    ditfast.sample(model, LABELS, num_steps=4, callback=callback)
    assert all(torch.equal(seen.latents, copied) for seen, copied in zip(watcher.seen, copies, strict=True))
    assert not any(seen.latents.is_inference() for seen in watcher.seen)


def stop_at(step: int, batch: int = 0) -> Callable[[int, float, Tensor], None]:
    batches = []

    def callback(i: int, time: float, latents: Tensor) -> None:
        batches.extend([1] if i == 0 else [])
        if i == step and len(batches) == batch + 1:
            raise StopIteration

    return callback


def test_a_callback_stops_the_run() -> None:
    model, watcher = new_dit(), Watcher()
    ditfast.sample(model, LABELS, num_steps=5, callback=watcher)
    stopped = ditfast.sample(model, LABELS, num_steps=5, callback=stop_at(3))
    assert torch.equal(stopped.latents, watcher.seen[3].latents)
    assert len(stopped) == len(LABELS)


def test_a_stop_in_one_batch_leaves_out_the_next() -> None:
    model = new_dit()
    whole = ditfast.sample(model, LABELS, num_steps=3, batch_size=1)
    stopped = ditfast.sample(model, LABELS, num_steps=3, batch_size=1, callback=stop_at(2, batch=1))
    assert stopped.labels.tolist() == LABELS[:2]
    assert torch.equal(stopped.latents[:1], whole.latents[:1])
    assert not torch.equal(stopped.latents[1:], whole.latents[1:2])


def test_an_error_of_a_callback_comes_through() -> None:
    def callback(step: int, time: float, latents: Tensor) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ditfast.sample(new_dit(), LABELS, num_steps=3, callback=callback)


# ------------------------------------------------------------------------------------------------ noise and batches
def test_the_seeds_noise_does_not_depend_on_the_batches() -> None:
    model = new_dit()
    whole = ditfast.sample(model, LABELS, num_steps=4, seed=3).latents
    for size in (1, 2, 3, 8):
        assert error(ditfast.sample(model, LABELS, num_steps=4, seed=3, batch_size=size).latents, whole) < 1e-5
    invariant = ditfast.sample(model, LABELS, num_steps=4, seed=3, batch_size=2, batch_invariant=True).latents
    assert torch.equal(ditfast.sample(model, LABELS, num_steps=4, seed=3, batch_invariant=True).latents, invariant)


def diffusers_noise(generator: Any) -> Tensor:
    utilities = pytest.importorskip("diffusers.utils.torch_utils")
    return utilities.randn_tensor((3, *CONFIG.input_shape), generator=generator)


def generators(kind: str) -> Any:
    if kind == "one":
        return torch.Generator().manual_seed(4)
    return [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("kind", ["one", "list"])
def test_a_generator_draws_the_noise_of_diffusers_pipelines(kind: str, batch_size: int | None) -> None:
    model = new_dit()
    expected = ditfast.sample(model, LABELS, num_steps="ddim5", latents=diffusers_noise(generators(kind))).latents
    found = ditfast.sample(model, LABELS, num_steps="ddim5", generator=generators(kind), batch_size=batch_size).latents
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["one", "list"])
def test_a_generator_draws_the_noise_of_every_step(kind: str) -> None:
    model = new_dit()
    found = ditfast.sample(model, LABELS, num_steps=4, generator=generators(kind)).latents
    assert torch.equal(ditfast.sample(model, LABELS, num_steps=4, generator=generators(kind), seed=9).latents, found)
    other = ditfast.sample(model, LABELS, num_steps=4, latents=diffusers_noise(generators(kind))).latents
    assert error(found, other) > 1e-3  # whose steps draw from the seed


def test_a_generator_drives_a_schedulers_noise() -> None:
    diffusers = pytest.importorskip("diffusers")
    model, scheduler = new_dit(), diffusers.DDPMScheduler(clip_sample=False)
    found = ditfast.sample(model, LABELS, scheduler=scheduler, num_steps=4, generator=generators("one"), cfg_scale=1).latents
    generator = generators("one")
    x = diffusers_noise(generator)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model(x, t.expand(3).float(), torch.tensor(LABELS))[:, :4]
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    assert error(found, x) < 1e-5


# ------------------------------------------------------------------------------------------------ what comes back
def test_images_of_a_pixel_model_are_rgb() -> None:
    for config, channels in ((PIXELS, 3), (ditfast.load_digits().config, 1)):
        samples = ditfast.sample(new_dit(config), LABELS, num_steps=2)
        assert samples.latents.shape == (3, channels, 8, 8)
        assert samples.images.shape == (3, 8, 8, 3)
        assert samples.images.dtype == np.uint8
        assert samples.latents.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("given", ["module", "folder"])
def test_latents_are_decoded_by_the_vae_given(given: str, tmp_path: Path) -> None:
    vae = tiny().eval()
    source = vae if given == "module" else str(saved(tmp_path / "vae"))
    samples = ditfast.sample(new_dit(), LABELS, num_steps=2, vae=source)
    assert samples.images.shape == (3, 16, 16, 3)
    assert (samples.images == to_pixels(decode(vae, samples.latents))).all()


def test_a_checkpoint_folder_brings_its_vae(tmp_path: Path) -> None:
    saved(tmp_path / "vae")
    ditfast.save_checkpoint(new_dit(), tmp_path / "transformer", layout="diffusers")
    model = ditfast.load_checkpoint(tmp_path)
    assert ditfast.sample(model, LABELS, num_steps=2).images.shape == (3, 16, 16, 3)


def test_a_vae_of_other_channels_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"^vae: decodes 4 channels, but the model makes 3"):
        ditfast.sample(
            new_dit(PIXELS), LABELS, num_steps=2, vae=tiny(), callback=lambda *given: pytest.fail("a step was taken")
        )


def test_samples_are_saved_as_a_grid_a_folder_and_arrays(tmp_path: Path) -> None:
    samples = ditfast.sample(ditfast.load_digits(), LABELS, num_steps=2)
    samples.save(str(tmp_path / "grid.png"))
    assert (load_png(tmp_path / "grid.png") == samples.grid()).all()
    samples.save(tmp_path / "images")
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [f"{i:06d}.png" for i in range(3)]
    assert (load_png(tmp_path / "images" / "000002.png") == samples.images[2]).all()
    samples.save(tmp_path / "images.npz")
    with np.load(tmp_path / "images.npz") as arrays:
        assert (arrays["arr_0"] == samples.images).all()
        assert arrays["arr_1"].tolist() == LABELS
    with pytest.raises(ValueError, match=r"^path: got 'a\.jpg', expected a folder, or a name that ends in \.png or \.npz"):
        samples.save("a.jpg")


def test_a_grid_holds_every_image() -> None:
    samples = ditfast.sample(ditfast.load_digits(), range(5), num_steps=2)
    cells = samples.images.repeat(4, axis=1).repeat(4, axis=2)  # 32 pixels a side
    grid = samples.grid(columns=2)
    assert grid.shape == (3 * 34 + 2, 2 * 34 + 2, 3)
    for i, cell in enumerate(cells):
        top, left = 2 + i // 2 * 34, 2 + i % 2 * 34
        assert (grid[top : top + 32, left : left + 32] == cell).all()


def test_a_notebook_shows_pixels_and_loads_no_vae_for_it() -> None:
    samples = ditfast.sample(ditfast.load_digits(), LABELS, num_steps=2)
    png = samples._repr_png_()
    assert png is not None
    assert struct.unpack(">II", png[16:24]) == (70, 70)
    latents = ditfast.sample(new_dit(), LABELS, num_steps=2)
    assert latents._repr_png_() is None
    assert Samples(latents.latents, latents.labels, {}, tiny())._repr_png_() is not None
    assert (
        repr(samples)
        == "Samples(3 latents of 1x8x8, labels=[0, 3, 4], solver=ddim, num_steps=2, cfg_scale=2.0, seed=0, clip=True)"
    )


def test_no_labels_are_no_images() -> None:
    samples = ditfast.sample(ditfast.load_digits(), [], num_steps=2)
    assert len(samples) == 0
    assert samples.images.shape == (0, 8, 8, 3)
    assert samples._repr_png_() is None


def test_an_infinite_image_has_no_pixels() -> None:
    samples = ditfast.sample(ditfast.load_digits(), LABELS, num_steps=2)
    samples.latents[1, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="image 1 came out infinite or NaN"):
        _ = samples.images


# ------------------------------------------------------------------------------------------------ arguments
NOISE = torch.zeros(3, 4, 8, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"num_steps": 1.5}, "num_steps: got 1.5"),
        ({"num_steps": True}, "num_steps: got True"),
        ({"num_steps": "ddim51"}, "num_steps: got 'ddim51'"),
        ({"num_steps": "ddim50", "solver": "heun"}, "num_steps: got 'ddim50', expected a positive integer with heun"),
        ({"solver": "dpm"}, "solver: got 'dpm', expected one of ddpm, ddim, euler, heun, sde"),
        ({"solver": "ddim", "scheduler": object()}, "solver: got 'ddim', expected None with a scheduler"),
        ({"scheduler": object()}, "scheduler: got an object"),
        ({"cfg_scale": [1.0, 2.0]}, "cfg_scale: got"),
        ({"labels": 3}, "labels: got 3"),
        ({"seed": None}, "seed: got None"),
        ({"generator": 3}, "generator: got 3"),
        ({"generator": [torch.Generator()]}, "generator: got 1 of them, expected a torch.Generator, or a list of 3"),
        ({"latents": NOISE[:2]}, r"latents: got a tensor \[2, 4, 8, 8\] of torch.float32, expected \[3, 4, 8, 8\] of floats"),
        ({"latents": NOISE.long()}, "latents: got a tensor"),
        ({"latents": NOISE.numpy()}, "latents: got a NumPy array"),
        ({"start_time": 500}, "latents: got None, expected those of start_time 500"),
        ({"start_time": 510, "latents": NOISE}, "start_time: got 510, expected the time of a step, such as 500 or 749"),
        ({"start_time": "half", "latents": NOISE}, "start_time: got 'half'"),
        ({"callback": 3}, "callback: got 3"),
        ({"callback": lambda i, t, x: x[:1]}, "callback: got a tensor"),
        ({"callback": lambda i, t, x: False}, "callback: got False"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"clip": "yes"}, "clip: got 'yes'"),
        ({"vae": 3}, "vae: got 3"),
        ({"model": 3}, "model: got 3"),
        ({"model": DiT}, "model: got a type"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_errors_name_the_argument(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ditfast.sample(**{"model": new_dit(), "labels": LABELS, "num_steps": 5, **given})
