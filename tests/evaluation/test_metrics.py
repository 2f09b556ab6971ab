import numpy as np
import pytest
import torch
from support import raises_naming
from torch import Tensor

from ditfast.evaluation import frechet_distance, gaussian, inception_score, metrics, precision_recall


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q


def covariance(dim: int) -> Tensor:
    root = torch.randn(dim, dim, dtype=torch.float64)
    return root @ root.T


def test_frechet_distance_on_a_line() -> None:
    distance = frechet_distance(torch.zeros(1), torch.ones(1, 1), torch.full((1,), 3.0), torch.full((1, 1), 4.0))
    assert distance == pytest.approx(3**2 + (1 - 2) ** 2)


@pytest.mark.parametrize("rank", [40, 20], ids=["regular", "singular"])
def test_frechet_distance_of_covariances_that_commute(rank: int) -> None:
    turn, (a, b) = rotation(40), torch.rand(2, 40, dtype=torch.float64)
    a[rank:] = 0
    mean1, mean2 = torch.randn(2, 40, dtype=torch.float64)
    exact = (mean1 - mean2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(mean1, turn * a @ turn.T, mean2, turn * b @ turn.T)
    assert found == pytest.approx(exact.item(), rel=1e-8)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    mean1, mean2 = torch.randn(2, 30, dtype=torch.float64)
    c1, c2 = covariance(30), covariance(30)
    cross = linalg.sqrtm((c1 @ c2).numpy()).trace().real
    exact = (mean1 - mean2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    assert frechet_distance(mean1, c1, mean2, c2) == pytest.approx(exact.item(), rel=1e-9)
    assert frechet_distance(mean2, c2, mean1, c1) == pytest.approx(exact.item(), rel=1e-9)
    assert abs(frechet_distance(mean1, c1, mean1, c1)) < 1e-9 * c1.trace()


def test_frechet_distance_names_what_does_not_fit() -> None:
    message = raises_naming(
        "means and covariances", lambda: frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))
    )
    assert "expected [D], [D, D], [D], [D, D]" in message


def test_gaussian_far_from_zero() -> None:
    features = torch.randn(5000, 7) @ torch.randn(7, 7) + 1000
    mean, found = gaussian(features)
    torch.testing.assert_close(mean, features.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, torch.from_numpy(np.cov(features.double().numpy(), rowvar=False)), rtol=1e-9, atol=1e-9)
    assert "N of 2 or more" in raises_naming("features", lambda: gaussian(torch.zeros(1, 7)))


def test_precision_and_recall_of_points_on_a_line() -> None:
    real = torch.arange(10.0)[:, None]
    inside, outside = torch.tensor([4.5, 4.6, 4.7, 4.8]), torch.tensor([1000.0, 1001.0, 1002.0, 1003.0])
    fake = torch.cat([inside, outside])[:, None]  # 5 is 0.2 from 4.8, whose third neighbour is 0.3 away; 4 is 0.5 from 4.5
    assert precision_recall(fake, real) == (0.5, 0.1)
    assert precision_recall(real, fake) == (0.1, 0.5)
    assert precision_recall(fake, real, neighbours=1) == (0.5, 0.0)
    assert precision_recall(real, real) == (1.0, 1.0)


def test_a_ball_holds_its_border() -> None:
    real = torch.arange(10.0)[:, None]
    assert precision_recall(torch.tensor([[-3.0], [12.0], [-4.0], [13.0]]), real)[0] == 0.5
    same = torch.ones(4, 2)
    assert precision_recall(same, same) == (1.0, 1.0)


@pytest.mark.parametrize("chunk", [metrics.CHUNK, 100, 1])
def test_precision_and_recall_of_clouds(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    fake, real = torch.randn(60, 3) + 1, torch.randn(45, 3)

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = [sorted((other - centre).norm().item() for other in centres)[3] for centre in centres]
        return np.mean([any((p - c).norm() <= r for c, r in zip(centres, radii, strict=True)) for p in points]).item()

    assert 0 < covered(fake, real) < 1
    assert precision_recall(fake, real) == pytest.approx((covered(fake, real), covered(real, fake)), abs=1e-12)


def test_precision_and_recall_name_what_does_not_fit() -> None:
    four, three, wide = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4, 3)
    assert "N of 4 or more" in raises_naming("features", lambda: precision_recall(three, four))
    assert "N of 4 or more" in raises_naming("reference", lambda: precision_recall(four, three))
    raises_naming("features", lambda: precision_recall(wide, four))


def test_inception_score_counts_classes() -> None:
    assert inception_score(torch.full((50, 10), 0.1)) == pytest.approx(1)
    assert inception_score(torch.eye(10).repeat(5, 1)) == pytest.approx(10)
    mixed = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    divergence = sum(p * np.log(p / 0.5) for p in (0.9, 0.1))
    assert inception_score(mixed) == pytest.approx(np.exp(divergence))


def test_inception_score_is_the_mean_over_splits() -> None:
    sorted_by_class = torch.eye(2).repeat_interleave(10, 0)
    for split, score in ((20, 2.0), (10, 1.0), (15, (np.exp(-sum(p * np.log(p) for p in (1 / 3, 2 / 3))) + 1) / 2)):
        assert inception_score(sorted_by_class, split) == pytest.approx(score)
    assert "N of 1 or more" in raises_naming("probabilities", lambda: inception_score(torch.zeros(0, 3)))
