"""The way to Inception: on a stand-in of torch-fidelity's interface, and on torch-fidelity itself where it is installed."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inception_stand_in import POOLED, SIZE, SPATIAL, StandIn, compare_module, inception_module, install
from torch import Tensor, nn

from ditfast.cli import main
from ditfast.evaluation import Gaussian, Inception, frechet_distance, gaussian, inception_score, open_images, precision_recall
from ditfast.images import Pixels, save_npz, save_png


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the stand-in, which takes torch-fidelity's place."""
    install(path := tmp_path / "weights.pth", monkeypatch)
    return path


def random_pixels(count: int, seed: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, channels)).astype(np.uint8)


def expected_features(weights: Path, pixels: Pixels) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled, spatial and probabilities, written out."""
    network = StandIn("", ["2048", "logits_unbiased"], str(weights))
    x = torch.from_numpy(pixels.repeat(4 - pixels.shape[3], axis=3)[..., :3]).permute(0, 3, 1, 2)
    with torch.no_grad():
        pooled, logits = network(x)
        spatial = network.Mixed_6d.branch1x1(x / 255)
    rows = [[spatial[n, c, i, j] for i in range(SIZE) for j in range(SIZE) for c in range(7)] for n in range(len(x))]
    return pooled, torch.tensor(rows), logits.softmax(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_laid_out_as_in_tensorflow(channels: int, weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    pixels = random_pixels(7, 0, channels)
    (tmp_path / "images").mkdir()
    for k, image in enumerate(pixels):
        save_png(tmp_path / "images" / f"{k}.png", image)
    done: list[int] = []
    inception = Inception(weights, torch.device("cpu"))
    found = inception.features(open_images(tmp_path / "images"), 3, done.append)
    for tensor, expected in zip(found, expected_features(weights, pixels), strict=True):
        torch.testing.assert_close(tensor, expected)
    assert done == [3, 3, 1]
    assert inception.name == "Inception V3 of torch-fidelity 0.0"


def test_scores_of_images_against_a_reference(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_npz(tmp_path / "a.npz", random_pixels(40, 0), [0] * 40)
    save_npz(tmp_path / "b.npz", random_pixels(30, 1) // 2, [0] * 30)
    arguments = ["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz"), "--inception", str(weights)]
    assert main([*arguments, "--json", "--batch-size", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    a, b = (expected_features(weights, pixels) for pixels in (random_pixels(40, 0), random_pixels(30, 1) // 2))
    precision, recall = precision_recall(a[0], b[0])
    expected = {
        "fid": frechet_distance(a[0], b[0]),
        "sfid": frechet_distance(a[1], b[1]),
        "inception_score": inception_score(a[2]),
        "precision": precision,
        "recall": recall,
    }
    assert found["scores"] == pytest.approx(expected, rel=1e-4)
    assert "real" not in found
    assert found["notes"] == ["FID of 40 images is higher than of the 50,000 that papers report"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "sFID" in table
    assert "half against half" not in table


def test_statistics_that_a_reference_brings_are_taken(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "a.npz", random_pixels(40, 0), [0] * 40)
    statistics = {"mu": np.full(POOLED, 2.0), "sigma": np.eye(POOLED), "mu_s": np.zeros(SPATIAL), "sigma_s": np.eye(SPATIAL)}
    np.savez(tmp_path / "b.npz", arr_0=random_pixels(4, 1), **statistics)  # too few for a covariance, enough for neighbours
    arguments = ["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz"), "--inception", str(weights)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pooled, spatial, _ = expected_features(weights, random_pixels(40, 0))
    fid = frechet_distance(gaussian(pooled), Gaussian(torch.full((POOLED,), 2.0), torch.eye(POOLED)))
    assert found["scores"]["fid"] == pytest.approx(fid, rel=1e-4)
    sfid = frechet_distance(gaussian(spatial), Gaussian(torch.zeros(SPATIAL), torch.eye(SPATIAL)))
    assert found["scores"]["sfid"] == pytest.approx(sfid, rel=1e-4)
    assert found["notes"][1] == f"FID and sFID are to the mean and covariance stored in {tmp_path / 'b.npz'}"
    np.savez(tmp_path / "b.npz", arr_0=random_pixels(4, 1), **statistics | {"mu": np.zeros(3)})
    assert main(arguments) == 2
    assert "mu, sigma, mu_s, sigma_s have the shapes [(3,)," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "reference", "fault"),
    [
        (6, 30, "a.npz: 6 images, expected 7 or more (a covariance of 6 features)"),
        (30, 6, "b.npz: 6 images, expected 7 or more (a covariance of 6 features)"),
        (30, 0, "a.npz: images of 8x8 pixels, expected 4x8"),
    ],
)
def test_one_line_for_images_that_cannot_be_compared(
    count: int, reference: int, fault: str, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "a.npz", random_pixels(count, 0), [0] * count)
    others = random_pixels(reference, 1) if reference else random_pixels(30, 1)[:, :, :4]
    save_npz(tmp_path / "b.npz", others, [0] * len(others))
    command = ["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz"), "--inception", str(weights)]
    assert main(command) == 2
    out, line = capfd.readouterr()
    assert out == ""
    assert line.strip().endswith(fault)


def test_one_line_without_weights(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "a.npz", random_pixels(30, 0), [0] * 30)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "a hub"))
    command = ["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "a.npz")]
    assert main(command) == 2
    place = tmp_path / "a hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    url = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    get = f"curl -L --create-dirs -o '{place}' {url}"
    line = f"ditfast evaluate: {place}: no such file, expected Inception's weights; get them once: {get}\n"
    assert capfd.readouterr() == ("", line)
    place.parent.mkdir(parents=True)
    place.write_bytes(weights.read_bytes()[:-1])
    assert main(command) == 2
    assert f"{place}: its SHA-256 begins with " in capfd.readouterr().err
    place.write_bytes(weights.read_bytes())
    assert main(command) == 0


def test_one_line_without_torch_fidelity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "a.npz", random_pixels(30, 0), [0] * 30)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert main(["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "a.npz")]) == 2
    out, line = capfd.readouterr()
    assert out == ""
    assert "needs torch-fidelity, which cannot be imported" in line
    assert line.endswith(": pip install 'ditfast[eval]'\n")
    assert line.count("\n") == 1


@pytest.mark.slow
def test_scores_are_those_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights, since a test downloads none: the same numbers by both."""
    try:
        import torch_fidelity
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torch-fidelity: {error}")
    pytest.importorskip("PIL")
    network = untrained(theirs, monkeypatch)
    weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), weights)
    monkeypatch.setattr(inception_module, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(compare_module, "POOLED", 10)  # so that a dozen images will do
    for folder, brightness in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        for k, pixels in enumerate(random_pixels(12, brightness) // brightness):
            save_png(tmp_path / folder / f"{k:02d}.png", pixels)
    images, reference = open_images(tmp_path / "a"), open_images(tmp_path / "b")
    ours = compare_module.compare(images, reference, Inception(weights, torch.device("cpu")), 6).as_dict()["scores"]
    found = torch_fidelity.calculate_metrics(
        input1=images.source, input2=reference.source, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
        fid=True, isc=True, prc=True, isc_splits=1, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    assert ours["fid"] == pytest.approx(found["frechet_inception_distance"], rel=1e-4)
    assert ours["inception_score"] == pytest.approx(found["inception_score_mean"], rel=1e-5)
    assert (ours["precision"], ours["recall"]) == pytest.approx((found["precision"], found["recall"]))


def untrained(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = theirs.FeatureExtractorInceptionV3("inception", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return network
