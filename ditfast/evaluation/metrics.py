"""How far one set of features is from another: Frechet distance, precision and recall, Inception score; in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..argument_checks import as_int, check_tensor

CHUNK = 2**25  # most distances held at once


class Gaussian(NamedTuple):
    mean: Tensor  # [D] float64
    covariance: Tensor  # [D, D] float64


def gaussian(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance of [N, D] features, of any floating dtype, N >= 2."""
    _check_floats("features", features)
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected [N, D] with N of 2 or more")
    mean = features.mean(0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for rows in features.split(4096):
        centred = rows.double() - mean
        covariance += centred.T @ centred
    return Gaussian(mean, covariance / (len(features) - 1))


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Frechet distance between two normal distributions (Heusel et al. 2017); FID where Inception made the features.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)``. The last trace is that of ``(R C2 R)^1/2`` with ``R = C1^1/2``, which is
    symmetric: two symmetric eigenvalue problems, that singular covariances do no harm to.

    Args:
        mean1: [D], as ``mean2``; any floating dtype, computed in float64.
        covariance1: [D, D] symmetric, as ``covariance2``.
    """
    named = {"mean1": mean1, "covariance1": covariance1, "mean2": mean2, "covariance2": covariance2}
    for name, tensor in named.items():
        _check_floats(name, tensor)
    dim = mean1.shape[0] if mean1.dim() == 1 else -1
    shapes = [tuple(t.shape) for t in named.values()]
    if shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(f"means and covariances: got shapes {shapes}, expected [D], [D, D], [D], [D, D]")
    mean1, covariance1, mean2, covariance2 = (t.double() for t in named.values())
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross)


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


def _check_floats(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name}: got a tensor {list(value.shape)} of {value.dtype}, expected floats")


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """[N]: each point's distance to its k-th nearest neighbour; the nearest of all is the point itself."""
    rows = points.split(max(1, CHUNK // len(points)))
    return torch.cat([torch.cdist(row, points).kthvalue(neighbours + 1, dim=1).values for row in rows])


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of points that lie in a ball."""
    rows = points.split(max(1, CHUNK // len(centres)))
    return float(torch.cat([(torch.cdist(row, centres) <= radii).any(dim=1) for row in rows]).double().mean())
