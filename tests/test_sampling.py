import pytest
import torch
from support import randomize

from ditfast import DiT, DiTConfig, load_digits
from ditfast.diffusion import GaussianDiffusion
from ditfast.digits import real_digits
from ditfast.sampling import initial_noise, sample

CONFIG = DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=5)


def test_noise_of_an_image_depends_on_seed_and_place_only() -> None:
    noise = initial_noise((4, 8, 8), 5, seed=7)
    assert torch.equal(initial_noise((4, 8, 8), 2, seed=7), noise[:2])
    assert not torch.equal(initial_noise((4, 8, 8), 5, seed=8), noise)
    assert not torch.equal(noise[0], noise[1])
    assert abs(initial_noise((1, 100, 100), 10, seed=0).std().item() - 1) < 0.01


def test_large_seeds_differ() -> None:
    noises = [initial_noise((1, 4, 4), 1, seed) for seed in (2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 4
    with pytest.raises(ValueError, match="seed: got -1"):
        initial_noise((1, 4, 4), 1, -1)


def test_no_labels_no_images() -> None:
    assert sample(DiT(CONFIG).eval(), GaussianDiffusion("4"), torch.empty(0, dtype=torch.long)).shape == (0, 4, 8, 8)


def test_guidance_one_is_the_conditional_model() -> None:
    model = randomize(DiT(CONFIG)).eval()
    labels = torch.tensor([0, 3, 4])
    diffusion = GaussianDiffusion("5")
    plain = sample(model, diffusion, labels, cfg_scale=1.0)
    assert plain.shape == (3, 4, 8, 8)
    torch.testing.assert_close(sample(model, diffusion, labels, cfg_scale=1.0001), plain, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(sample(model, diffusion, labels, cfg_scale=3.0), plain, atol=1e-2)


def test_clip_keeps_images_in_range() -> None:
    model = randomize(DiT(CONFIG)).eval()
    free, clipped = (sample(model, GaussianDiffusion("4"), torch.tensor([1]), clip=clip).abs().max() for clip in (False, True))
    assert clipped <= 1 < free


def test_steps_are_reported_and_low_precision_works() -> None:
    model = randomize(DiT(CONFIG)).eval().bfloat16()
    steps = []
    images = sample(model, GaussianDiffusion("4"), torch.tensor([1, 2]), cfg_scale=2.0, on_step=lambda: steps.append(1))
    assert len(steps) == 4
    assert images.dtype == torch.float32


def classifier_accuracy(per_class: int) -> float:
    """How many guided samples an SVM trained on the real scans reads as the digit asked for."""
    svm = pytest.importorskip("sklearn.svm")
    scans, digits = real_digits()
    classifier = svm.SVC(gamma=0.05, C=10).fit(scans.flatten(1).numpy(), digits.numpy())
    labels = torch.arange(10).repeat(per_class)
    images = sample(load_digits(), GaussianDiffusion("ddim50"), labels, cfg_scale=2.0, seed=0, clip=True)
    return float((classifier.predict(images.clamp(-1, 1).flatten(1).numpy()) == labels.numpy()).mean())


def test_the_digits_model_draws_the_digit_asked_for() -> None:
    assert classifier_accuracy(per_class=10) >= 0.85


@pytest.mark.slow
def test_the_digits_model_on_a_thousand_samples() -> None:
    accuracy = classifier_accuracy(per_class=100)
    print(f"read as asked: {accuracy:.1%}")
    assert accuracy >= 0.85
