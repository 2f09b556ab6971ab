"""The loop against a loop written plainly over the reference model, one lever after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import error, randomize
from torch import Tensor

from ditfast import DiT, DiTConfig, load_digits, reference
from ditfast.diffusion import FlowMatching, GaussianDiffusion, Step, apply_update, steps
from ditfast.digits import real_digits
from ditfast.sampling import image_noise, sample

CONFIG = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=5)
LABELS = torch.tensor([0, 3, 4])
DDPM = steps(GaussianDiffusion("6"), "ddpm")
DDIM = steps(GaussianDiffusion("ddim5"), "ddim")


def pair(config: DiTConfig = CONFIG) -> tuple[DiT, reference.DiT]:
    oracle = randomize(reference.DiT(config)).eval()
    model = DiT(config).eval()
    model.load_state_dict(oracle.state_dict())
    return model, oracle


@torch.no_grad()
def plain_loop(
    oracle: reference.DiT,
    schedule: Sequence[Step],
    labels: Tensor,
    scales: Sequence[float],
    channels: int = 3,
    interval: tuple[float, float] = (-math.inf, math.inf),
    clip: bool = False,
) -> Tensor:
    """Every step computes everything, for each image and each half by itself."""
    images = []
    for k, (label, scale) in enumerate(zip(labels.tolist(), scales, strict=True)):
        shape = oracle.config.input_shape
        x, x_before, output_before = image_noise(shape, [k], 0).to(oracle.pos_embed.dtype), None, None
        for i, step in enumerate(schedule):
            t = torch.full((1,), step.t)
            output = oracle(x, t, torch.tensor([label]))
            if scale != 1 and interval[0] <= step.t <= interval[1]:
                unconditional = oracle(x, t, torch.tensor([oracle.config.null_class]))
                guided = unconditional + scale * (output - unconditional)
                output = torch.cat([guided[:, :channels], output[:, channels:]], dim=1)
            if step.corrects:
                x, output = x_before, (output_before + output) / 2
            x_before, output_before = x, output
            x = apply_update(x, output, image_noise(shape, [k], 0, i + 1), step.update, clip)
        images.append(x)
    return torch.cat(images)


# ------------------------------------------------------------------------------------------------ noise
def test_noise_of_an_image_depends_on_seed_number_and_step_only() -> None:
    noise = image_noise((4, 8, 8), range(5), seed=7)
    assert torch.equal(image_noise((4, 8, 8), [3, 1], seed=7), noise[[3, 1]])
    others = [image_noise((4, 8, 8), range(5), seed=8), image_noise((4, 8, 8), range(5), seed=7, step=1), noise.roll(1, 0)]
    assert all(not torch.equal(other[k], noise[k]) for other in others for k in range(5))
    assert abs(image_noise((1, 100, 100), range(10), seed=0).std().item() - 1) < 0.01


def test_large_seeds_differ() -> None:
    noises = [image_noise((1, 4, 4), [0], seed) for seed in (2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 4
    with pytest.raises(ValueError, match="seed: got -1"):
        image_noise((1, 4, 4), [0], -1)


# ------------------------------------------------------------------------------------------------ the loop
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(DDPM, id="ddpm"),
        pytest.param(DDIM, id="ddim"),
        pytest.param(steps(GaussianDiffusion("4"), "ddim", eta=0.7), id="ddim-eta"),
        pytest.param(steps(FlowMatching(num_steps=5), "euler"), id="euler"),
        pytest.param(steps(FlowMatching("gvp", num_steps=4), "heun"), id="heun"),
        pytest.param(steps(FlowMatching(num_steps=5), "sde"), id="sde"),
    ],
)
def test_every_solver_agrees_with_the_plain_loop(schedule: list[Step], scale: float) -> None:
    model, oracle = pair()
    found = sample(model, schedule, LABELS, cfg_scale=scale)
    assert error(found, plain_loop(oracle.double(), schedule, LABELS, [scale] * 3).float()) < 1e-5


@pytest.mark.parametrize("table_bytes", [0, 1, 200_000, 2**29])
@pytest.mark.parametrize("design", ["adaln_zero", "adaln", "in_context", "cross_attention"])
def test_the_table_changes_nothing(design: str, table_bytes: int) -> None:
    model, oracle = pair(DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=5, conditioning=design))
    found = sample(model, DDPM, LABELS, cfg_scale=3.0, table_bytes=table_bytes)
    assert error(found, plain_loop(oracle, DDPM, LABELS, [3.0] * 3)) < 1e-5


def test_windows_of_the_table_give_the_same_bits() -> None:
    model, _ = pair()
    whole, windows = (sample(model, DDPM, LABELS, cfg_scale=3.0, table_bytes=size) for size in (2**29, 15_000))
    assert torch.equal(whole, windows)


def test_scales_and_channels_and_intervals_of_guidance() -> None:
    model, oracle = pair()
    scales, interval = [1.0, 2.5, 7.0], (150.0, 850.0)
    found = sample(model, DDPM, LABELS, cfg_scale=scales, cfg_interval=interval, guidance_channels=4)
    assert error(found, plain_loop(oracle, DDPM, LABELS, scales, 4, interval)) < 1e-5
    always = sample(model, DDPM, LABELS, cfg_scale=scales, guidance_channels=4)
    assert error(found, always) > 1e-3


def count_samples(model: DiT) -> list[int]:
    seen: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def test_only_guided_steps_pay_for_the_second_half() -> None:
    model, _ = pair()
    seen = count_samples(model)
    sample(model, DDPM, LABELS, cfg_scale=1.0)
    assert seen == [3] * 6
    seen.clear()
    sample(model, DDPM, LABELS, cfg_scale=4.0, cfg_interval=(150.0, 850.0))
    assert seen == [3, 6, 6, 6, 6, 3]


def test_the_shared_half_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    seen: list[int] = []
    model.x_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    sample(model, DDIM, LABELS, cfg_scale=4.0)
    assert seen == [3] * len(DDIM)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, _ = pair()
    whole = sample(model, DDPM, LABELS, cfg_scale=4.0, images=[10, 11, 12], batch_invariant=True)
    alone = sample(model, DDPM, LABELS[1:2], cfg_scale=4.0, images=[11], batch_invariant=True)
    assert torch.equal(whole[1:2], alone)
    backwards = sample(model, DDPM, LABELS.flip(0), cfg_scale=4.0, images=[12, 11, 10], batch_invariant=True)
    assert torch.equal(whole.flip(0), backwards)
    together = sample(model, DDPM, LABELS, cfg_scale=4.0, images=[10, 11, 12])
    assert error(together, whole) < 1e-5


def test_no_labels_no_images() -> None:
    model, _ = pair()
    assert sample(model, DDPM, torch.empty(0, dtype=torch.long), cfg_scale=2.0).shape == (0, 4, 8, 8)


def test_clip_keeps_images_in_range() -> None:
    model, _ = pair()
    free, clipped = (sample(model, DDIM, LABELS, clip=clip).abs().max() for clip in (False, True))
    assert clipped <= 1 < free


def test_steps_are_reported_and_low_precision_works() -> None:
    model, _ = pair()
    seen: list[int] = []
    images = sample(model.bfloat16(), DDIM, LABELS, cfg_scale=2.0, on_step=lambda: seen.append(1))
    assert len(seen) == len(DDIM)
    assert images.dtype == torch.float32


def test_offloaded_conditioning_comes_back() -> None:
    model, _ = pair()
    expected = sample(model, DDPM, LABELS, cfg_scale=3.0)
    addresses = [id(parameter) for parameter in model.parameters()]
    assert torch.equal(sample(model, DDPM, LABELS, cfg_scale=3.0, offload_conditioning=True), expected)
    assert [id(parameter) for parameter in model.parameters()] == addresses
    assert torch.equal(sample(model, DDPM, LABELS, cfg_scale=3.0), expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_diffusers_scheduler_drives_the_loop(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    model, oracle = pair()
    without_clipping = {} if name.startswith("DPM") else {"clip_sample": False}
    scheduler = getattr(diffusers, name)(beta_start=1e-4, beta_end=2e-2, **without_clipping)
    scheduler.set_timesteps(5)
    found = sample(model, [], LABELS, cfg_scale=2.0, guidance_channels=4, scheduler=scheduler)
    alone = sample(model, [], LABELS[2:], cfg_scale=2.0, guidance_channels=4, scheduler=scheduler, images=[2])
    assert error(alone, found[2:]) < 1e-5
    if name == "DDIMScheduler":
        x = image_noise((4, 8, 8), range(3), 0)
        with torch.no_grad():
            for t in scheduler.timesteps:
                both = oracle(torch.cat([x, x]), t.expand(6).float(), torch.cat([LABELS, torch.full_like(LABELS, 5)]))
                conditional, unconditional = both[:, :4].chunk(2)
                x = scheduler.step(unconditional + 2.0 * (conditional - unconditional), t, x).prev_sample
        assert error(found, x) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": [1.0, 2.0]}, "cfg_scale: got"),
        ({"cfg_scale": math.nan}, "cfg_scale: got nan"),
        ({"labels": torch.tensor([0, 6, 1])}, "labels: got 0..6, expected 0..5"),
        ({"labels": torch.zeros(3)}, "labels: got"),
        ({"images": [1]}, "images: got 1 numbers"),
        ({"guidance_channels": 5}, "guidance_channels: got 5"),
        ({"offload_conditioning": True, "table_bytes": 0}, "offload_conditioning: got True"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    model, _ = pair()
    with pytest.raises(ValueError, match=f"^{message}"):
        sample(model, DDPM, **{"labels": LABELS, **options})


def test_a_training_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: got a model in training mode"):
        sample(DiT(CONFIG), DDPM, LABELS)


def test_modulation_vectors_stand_for_times_and_labels() -> None:
    model, _ = pair()
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([5.0, 400.0, 999.0])
    with torch.no_grad():
        vectors = model.modulation_vectors(t, LABELS)
        assert error(model.forward_modulated(x, vectors), model(x, t, LABELS)) < 1e-6
        with pytest.raises(ValueError, match=r"vectors: got shape \(2, 896\), expected \[3 or 6, 896\]"):
            model.forward_modulated(x, vectors[:2])
        with pytest.raises(ValueError, match=r"x: got shape \(3, 4, 8\)"):
            model.forward_modulated(x[..., 0], vectors)


# ------------------------------------------------------------------------------------------------ the digits
def classifier_accuracy(per_class: int) -> float:
    """How many guided samples an SVM trained on the real scans reads as the digit asked for."""
    svm = pytest.importorskip("sklearn.svm")
    scans, digits = real_digits()
    classifier = svm.SVC(gamma=0.05, C=10).fit(scans.flatten(1).numpy(), digits.numpy())
    labels = torch.arange(10).repeat(per_class)
    images = sample(load_digits(), steps(GaussianDiffusion("ddim50"), "ddim"), labels, cfg_scale=2.0, seed=0, clip=True)
    return float((classifier.predict(images.clamp(-1, 1).flatten(1).numpy()) == labels.numpy()).mean())


def test_the_digits_model_draws_the_digit_asked_for() -> None:
    assert classifier_accuracy(per_class=10) >= 0.85


@pytest.mark.slow
def test_the_digits_model_on_a_thousand_samples() -> None:
    accuracy = classifier_accuracy(per_class=100)
    print(f"read as asked: {accuracy:.1%}")
    assert accuracy >= 0.85
