"""How far one set of features is from another: Frechet distance, precision and recall, Inception score; in float64."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..argument_checks import as_int, check_tensor, wrong_type

CHUNK = 2**25  # most distances held at once


class Gaussian(NamedTuple):
    mean: Tensor  # [D] float64
    covariance: Tensor  # [D, D] float64


def gaussian(features: Tensor | np.ndarray) -> Gaussian:
    """Return mean and unbiased covariance of [N, D] features, of any floating dtype, N >= 2."""
    return _gaussian("features", features)


@torch.no_grad()
def frechet_distance(
    features_a: Tensor | np.ndarray | Gaussian, features_b: Tensor | np.ndarray | Gaussian, *deprecated: Tensor
) -> float:
    """Return the squared Frechet distance between two normal distributions (Heusel et al. 2017).

    It is FID where Inception made the features: ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)``. The last trace is that of
    ``(R C2 R)^1/2`` with ``R = C1^1/2``, which is symmetric: two symmetric eigenvalue problems, that singular covariances do
    no harm to.

    Args:
        features_a: [N, D] features, a tensor or a NumPy array of any floating dtype, N >= 2, computed in float64; or their
            ``Gaussian``, as ``gaussian`` returns it.
        features_b: [M, D], likewise.
        deprecated: the rest of the former four arguments, mean and covariance of each.

    Raises:
        ValueError: the features' shapes do not fit, there are too few of them, or some are infinite or NaN.
        TypeError: an argument of the wrong kind; the message names it.
    """
    if deprecated:
        warnings.warn(
            "frechet_distance(mean1, covariance1, mean2, covariance2) is deprecated: give frechet_distance two arrays of "
            "features, or two Gaussian(mean, covariance)",
            DeprecationWarning,
            stacklevel=2,
        )
        features_a, features_b = Gaussian(features_a, features_b), Gaussian(*deprecated)  # type: ignore[arg-type]
    mean_a, covariance_a = _gaussian("features_a", features_a)
    mean_b, covariance_b = (part.to(mean_a.device) for part in _gaussian("features_b", features_b))
    if len(mean_a) != len(mean_b):
        raise ValueError(f"features_b: got {len(mean_b)} features, expected {len(mean_a)}, as features_a")
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of [N, D] features against [M, D] of real images (Kynkäänniemi et al. 2019), N and M > neighbours.

    Each point has a ball that reaches to its k-th nearest neighbour in its own set. Precision: the share of ``features`` in a
    ball of the reference's; recall: the share of the reference in a ball of the features'.
    """
    neighbours = as_int("neighbours", neighbours, 1)
    for name, points in (("features", features), ("reference", reference)):
        _check_floats(name, points)
    for name, points in (("features", features), ("reference", reference)):
        if points.dim() != 2 or len(points) <= neighbours or points.shape[1] != reference.shape[-1]:
            raise ValueError(f"{name}: got shape {tuple(points.shape)}, expected [N, D] with N of {neighbours + 1} or more")
    centre = reference.mean(0, dtype=torch.float64)  # cdist takes products, which cancel least near the origin
    features, reference = features.double() - centre, reference.double() - centre
    precision = _covered(features, reference, _radii(reference, neighbours))
    return precision, _covered(reference, features, _radii(features, neighbours))


def inception_score(probabilities: Tensor, split: int = 5000) -> float:
    """``exp(E KL(p(y|x) || p(y)))`` (Salimans et al. 2016): 1, where all images look alike, to the number of classes.

    Args:
        probabilities: [N, classes], rows that sum to 1.
        split: images for each p(y), as in ADM's evaluator; the result is the mean over splits.
    """
    _check_floats("probabilities", probabilities)
    split = as_int("split", split, 1)
    if probabilities.dim() != 2 or not len(probabilities):
        raise ValueError(f"probabilities: got shape {tuple(probabilities.shape)}, expected [N, classes] with N of 1 or more")
    scores = []
    for part in probabilities.double().split(split):
        mean = part.mean(0)
        divergence = torch.special.entr(mean).sum() - torch.special.entr(part).sum(1).mean()  # E KL: H(mean) - E H
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())


def _gaussian(name: str, features: Tensor | np.ndarray | Gaussian) -> Gaussian:
    """Return the mean and covariance of features, or check those that were given; the errors name the argument."""
    if isinstance(features, Gaussian):
        return _checked(name, features)
    if isinstance(features, np.ndarray) and np.issubdtype(features.dtype, np.floating):
        features = torch.from_numpy(np.array(features, np.float64 if features.itemsize > 8 else f"=f{features.itemsize}"))
    if not isinstance(features, Tensor):
        raise wrong_type(name, features, "a tensor or a NumPy array [N, D] of floats")
    _check_floats(name, features)
    if features.dim() != 2 or len(features) < 2 or not features.shape[1]:
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected [N, D] with N of 2 or more")
    chunks = features.split(4096)
    mean = torch.stack([rows.double().sum(0) for rows in chunks]).sum(0) / len(features)
    if not mean.isfinite().all():
        bad = next(i for i, row in enumerate(features) if not row.double().isfinite().all())
        raise ValueError(f"{name}: got infinities or NaN in row {bad}, expected finite numbers")
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for rows in chunks:
        centered = rows.double() - mean
        covariance += centered.T @ centered
    return Gaussian(mean, covariance / (len(features) - 1))


def _checked(name: str, given: Gaussian) -> Gaussian:
    for part in given:
        _check_floats(name, part)
    (mean, covariance), shapes = given, tuple(tuple(part.shape) for part in given)
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{name}: got a mean and a covariance of shapes {shapes}, expected [D] and [D, D]")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{name}: got infinities or NaN in its mean or covariance, expected finite numbers")
    return Gaussian(mean.double(), covariance.double())


def _check_floats(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name}: got a tensor {list(value.shape)} of {value.dtype}, expected floats")


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """[N]: each point's distance to its k-th nearest neighbour; the nearest of all is the point itself."""
    rows = points.split(max(1, CHUNK // len(points)))
    return torch.cat([torch.cdist(row, points).kthvalue(neighbours + 1, dim=1).values for row in rows])


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    rows = points.split(max(1, CHUNK // len(centres)))
    return float(torch.cat([(torch.cdist(row, centres) <= radii).any(dim=1) for row in rows]).double().mean())
