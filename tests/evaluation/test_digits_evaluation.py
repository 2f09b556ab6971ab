"""Digits through the small classifier, from the functions up to the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ditfast.cli import main
from ditfast.evaluation import frechet_distance
from ditfast.evaluation.digits_classifier import digits_classifier, digits_quality, scans_as_images
from ditfast.images import Pixels, save_npz, save_png, to_pixels

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scans() -> tuple[Tensor, Tensor]:
    return scans_as_images()


def distance(images: Tensor, reference: Tensor) -> float:
    features = digits_classifier().features
    return frechet_distance(features(images), features(reference))


def npz(folder: Path, pixels: Pixels, labels: list[int]) -> str:
    save_npz(folder / "images.npz", pixels, labels)
    return str(folder / "images.npz")


def test_the_classifier_reads_scans_it_has_not_seen() -> None:
    assert digits_classifier().accuracy >= 0.97


def test_training_is_repeatable_and_leaves_no_trace(scans: tuple[Tensor, Tensor]) -> None:
    features = digits_classifier().features(scans[0])
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    with torch.inference_mode():
        again = digits_classifier.__wrapped__()
    assert torch.equal(again.features(scans[0]), features)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_quality_is_distance_and_reading_of_rounded_images(scans: tuple[Tensor, Tensor]) -> None:
    images, labels = scans
    assert digits_quality(images, labels) == (pytest.approx(0, abs=1e-9), pytest.approx(1, abs=0.01))
    shifted = (images[:300] + 0.1).clamp(-1, 1)
    found, accuracy = digits_quality(shifted, (labels[:300] + 1) % 10)
    rounded = torch.from_numpy(to_pixels(shifted)).permute(0, 3, 1, 2) / 127.5 - 1
    assert found == pytest.approx(distance(rounded, images))
    assert found != pytest.approx(distance(shifted, images), rel=1e-6)
    assert accuracy < 0.1


def test_the_distance_grows_with_noise_and_with_a_missing_digit(scans: tuple[Tensor, Tensor]) -> None:
    images, labels = scans
    half, other_half = images[torch.randperm(len(images))].chunk(2)
    floor = distance(half, other_half)
    noisy = [distance((images + level * torch.randn(images.shape)).clamp(-1, 1), images) for level in (0.05, 0.2, 0.8)]
    uniform = distance(torch.rand(images.shape) * 2 - 1, images)
    assert 0 < noisy[0] < noisy[1] < noisy[2] < uniform
    assert noisy[0] < floor < noisy[2]
    assert uniform > 50 * floor
    assert distance(images[labels != 9], images) > 2 * floor


def test_real_scans_with_their_labels_score_as_real(
    scans: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = scans[0][::2], scans[1][::2]
    assert main(["evaluate", npz(tmp_path, to_pixels(images), labels.tolist()), "--reference", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["count"], found["reference_count"]) == (899, 1797)
    assert found["scores"].keys() == {"frechet_distance", "precision", "recall", "inception_score", "accuracy"}
    assert 0 < found["scores"]["frechet_distance"] < found["real"]["frechet_distance"]  # these scans are among the 1,797
    assert found["real"]["frechet_distance"] < found["noise"]["frechet_distance"] / 50
    assert found["scores"]["precision"] == 1
    assert found["scores"]["recall"] > 0.8
    assert found["scores"]["accuracy"] >= 0.98
    assert found["noise"]["precision"] == found["noise"]["recall"] == 0
    assert found["noise"]["inception_score"] < 2 < 6 < found["scores"]["inception_score"] < 10
    shifted = npz(tmp_path, to_pixels(images), ((labels + 1) % 10).tolist())
    main(["evaluate", shifted, "--reference", "digits", "--json"])
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy"] < 0.02


def test_the_table_of_a_folder(scans: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    for k, pixels in enumerate(to_pixels(scans[0][:40])):
        save_png(tmp_path / f"{k}.png", pixels)
    assert main(["evaluate", str(tmp_path), "--reference", "digits"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}: 40 images against digits, 1,797 images, by the digits classifier\n" in out
    for expected in ("Frechet distance", "precision", "recall", "half against half", "noise"):
        assert expected in out
    assert "the Frechet distance of 40 images is higher than of 1,000" in out
    assert "as the digit asked for" not in out, "there are no labels"


@pytest.mark.parametrize(
    ("pixels", "labels", "fault"),
    [
        (np.zeros((32, 8, 8, 1)), [0] * 32, "32 images, expected 33 or more (a covariance of 32 features)"),
        (np.zeros((40, 8, 6, 1)), [0] * 40, "images of 6x8 pixels, expected 8x8"),
        (np.arange(40 * 8 * 8 * 3).reshape(40, 8, 8, 3) % 256, [0] * 40, "images with colours, expected grey digits"),
        (np.zeros((40, 8, 8, 1)), [3] * 39 + [10], "labels 3..10, expected digits 0..9"),
    ],
)
def test_one_line_for_images_that_are_no_digits(
    pixels: np.ndarray, labels: list[int], fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = npz(tmp_path, pixels.astype(np.uint8), labels)
    assert main(["evaluate", path, "--reference", "digits", "--json"]) == 2
    assert capfd.readouterr() == ("", f"ditfast evaluate: {path}: {fault}\n")


def test_one_line_for_an_empty_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path), "--reference", "digits"]) == 2
    assert capfd.readouterr() == ("", f"ditfast evaluate: {tmp_path}: no PNG files, expected some (or an .npz file's name)\n")


def test_one_line_without_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = npz(tmp_path, np.zeros((40, 8, 8, 1), np.uint8), [0] * 40)
    save_png(tmp_path / "a.png", np.zeros((8, 8, 1), np.uint8))
    digits_classifier.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for images, library in ((path, "digits needs scikit-learn"), (str(tmp_path), "Pillow, which is not installed")):
        assert main(["evaluate", images, "--reference", "digits"]) == 2
        out, line = capfd.readouterr()
        assert out == ""
        assert line.startswith("ditfast evaluate: ")
        assert library in line
        assert line.endswith(": pip install 'ditfast[eval]'\n")


@pytest.mark.slow
def test_a_thousand_samples_of_the_digits_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    out = str(tmp_path / "samples")
    assert main(["sample", "--out", out, "--per-class", "100", "--batch", "250"]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, "--reference", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    print(found["scores"])
    assert found["scores"]["frechet_distance"] < 4 * found["real"]["frechet_distance"]
    assert found["scores"]["precision"] > 0.85
    assert found["scores"]["recall"] > 0.5
    assert found["scores"]["accuracy"] > 0.98
