import math
from typing import Any

import numpy as np
import pytest
import torch
from support import raises_naming
from torch import Tensor

from ditfast.evaluation import Gaussian, frechet_distance, gaussian, inception_score, metrics, precision_recall


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q


def covariance(dim: int) -> Tensor:
    root = torch.randn(dim, dim, dtype=torch.float64)
    return root @ root.T


def test_frechet_distance_on_a_line() -> None:
    one, other = Gaussian(torch.zeros(1), torch.ones(1, 1)), Gaussian(torch.full((1,), 3.0), torch.full((1, 1), 4.0))
    distance = frechet_distance(one, other)
    assert distance == pytest.approx(3**2 + (1 - 2) ** 2)


@pytest.mark.parametrize("rank", [40, 20], ids=["regular", "singular"])
def test_frechet_distance_of_covariances_that_commute(rank: int) -> None:
    turn, (a, b) = rotation(40), torch.rand(2, 40, dtype=torch.float64)
    a[rank:] = 0
    mean1, mean2 = torch.randn(2, 40, dtype=torch.float64)
    exact = (mean1 - mean2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(Gaussian(mean1, turn * a @ turn.T), Gaussian(mean2, turn * b @ turn.T))
    assert found == pytest.approx(exact.item(), rel=1e-8)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    mean1, mean2 = torch.randn(2, 30, dtype=torch.float64)
    c1, c2 = covariance(30), covariance(30)
    cross = linalg.sqrtm((c1 @ c2).numpy()).trace().real
    exact = (mean1 - mean2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    one, other = Gaussian(mean1, c1), Gaussian(mean2, c2)
    assert frechet_distance(one, other) == pytest.approx(exact.item(), rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(exact.item(), rel=1e-9)
    assert abs(frechet_distance(one, one)) < 1e-9 * c1.trace()
    with pytest.warns(DeprecationWarning, match="two arrays of features"):
        assert frechet_distance(mean1, c1, mean2, c2) == frechet_distance(one, other)


@pytest.mark.parametrize("dtype", [">f4", "f2", "f4", "f8", "longdouble"])
def test_frechet_distance_of_arrays_is_that_of_tensors(dtype: str) -> None:
    a, b = (np.random.default_rng(seed).normal(size=(50, 6)).astype(dtype) for seed in (0, 1))
    exact = [torch.tensor(array.astype(np.float64)) for array in (a, b)]
    expected = frechet_distance(*exact)
    means = [x.mean(0) for x in exact]
    roots = [torch.linalg.eigh(torch.cov(x.T)) for x in exact]
    root, other = (vectors * values.sqrt() @ vectors.T for values, vectors in roots)
    trace = sum(values.sum() for values, _ in roots) - 2 * torch.linalg.svdvals(root @ other).sum()
    assert expected == pytest.approx(((means[0] - means[1]).square().sum() + trace).item(), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, gaussian(exact[1])) == pytest.approx(expected, rel=1e-12)
    a.flags.writeable = False
    assert frechet_distance(a[::-1], b[::-1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frechet_distance_of_tensors_is_computed_in_float64(dtype: torch.dtype) -> None:
    a, b = (torch.randn(40, 5) + 3).to(dtype).requires_grad_(), torch.randn(30, 5).to(dtype)
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (torch.zeros(1, 3), "N of 2 or more"),
        (torch.zeros(3), "N of 2 or more"),
        (torch.zeros(4, 0), "N of 2 or more"),
        (torch.randn(9, 4), "expected 3, as features_a"),
        (torch.tensor([[0.0, 1.0, 2.0], [1.0, math.nan, 2.0]]), "NaN in row 1"),
        (np.array([[0.0, 1.0, math.inf], [1.0, 1.0, 2.0]], np.float32), "NaN in row 0"),
        (torch.zeros(4, 3, dtype=torch.int64), "expected floats"),
        (Gaussian(torch.zeros(3), torch.eye(2)), "expected [D] and [D, D]"),
        (Gaussian(torch.zeros(3), torch.full((3, 3), math.nan)), "expected finite numbers"),
    ],
    ids=["one row", "1-d", "no columns", "width", "NaN", "infinite array", "integers", "covariance shape", "NaN covariance"],
)
def test_frechet_distance_names_what_does_not_fit(bad: Any, expected: str) -> None:
    good = torch.randn(5, 3)
    assert expected in raises_naming("features_b", lambda: frechet_distance(good, bad))
    if "as features_a" not in expected:
        assert expected in raises_naming("features_a", lambda: frechet_distance(bad, good))


@pytest.mark.parametrize("bad", [None, [[1.0, 2.0]], np.zeros((3, 2), np.int64), "features"], ids=type)
def test_frechet_distance_takes_tensors_and_arrays_of_floats(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^features_a: got .*, expected a tensor or a NumPy array \[N, D\] of floats"):
        frechet_distance(bad, torch.randn(3, 2))


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
