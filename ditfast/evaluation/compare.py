"""Images against a reference: real digits through the small classifier, all others through Inception."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..argument_checks import as_int, check_callable, check_type, describe
from ..images import Pixels, from_pixels
from .digits_classifier import FEATURES, DigitsClassifier, digits_classifier, scans_as_images
from .errors import EvaluationError
from .image_set import ImageSet, npz_array
from .inception import POOLED, SPATIAL, Inception
from .metrics import Gaussian, frechet_distance, gaussian, inception_score, precision_recall
from .report import Report, Score

AN_IMAGE_SET = "an ImageSet, such as open_images returns"
NEIGHBOURS = 3
PAPERS_COUNT = 50_000
USUAL_COUNT = 1_000  # of digits


# ------------------------------------------------------------------------------------------------ digits
def compare_with_digits(images: ImageSet) -> Report:
    """8x8 digits against scikit-learn's 1,797 scans; where the images have labels, how many are read as such.

    Two columns beside the scores make a scale of them: one random half of the scans against the other (no bound: halves have
    fewer scans to resemble), and uniform noise against the scans. The Frechet distance of halves is 0.50 and of noise 82; of
    1,000 images of the model that ships, 50 DDIM steps, one seed, 1.62 with guidance 2, 0.25 with guidance 1 and 3.39
    with 4.

    Raises:
        EvaluationError: no scikit-learn, or images that are no digits, or too few.
        TypeError: no ``ImageSet``.
    """
    check_type("images", images, ImageSet, AN_IMAGE_SET)
    _expect_size(images, (8, 8))
    _expect_count(images, FEATURES + 1, f"a covariance of {FEATURES} features")
    if images.labels is not None and not 0 <= images.labels.min() <= images.labels.max() <= 9:
        raise EvaluationError(f"{images.source}: labels {images.labels.min()}..{images.labels.max()}, expected digits 0..9")
    try:
        classifier = digits_classifier()
    except ImportError as error:
        raise EvaluationError("the reference digits needs scikit-learn: pip install 'ditfast[eval]'") from error
    scans, _ = scans_as_images()
    generator = torch.Generator().manual_seed(0)
    half, other_half = scans[torch.randperm(len(scans), generator=generator, device="cpu")].chunk(2)
    noise = torch.rand(USUAL_COUNT, 1, 8, 8, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
    digits = torch.cat([_grey(pixels, images.source) for pixels in images.batches(4096)])
    found = _digits_scores(classifier, digits, scans)
    scale = zip(_digits_scores(classifier, half, other_half), _digits_scores(classifier, noise, scans), strict=True)
    scores = [replace(score, real=real.value, noise=noise.value) for score, (real, noise) in zip(found, scale, strict=True)]
    if images.labels is not None:
        read = classifier.probabilities(classifier.features(digits)).argmax(dim=1)
        asked = (read == torch.from_numpy(images.labels)).double().mean()
        scores.append(Score("accuracy", "read as the digit asked for", "higher", float(asked)))
    notes = [f"the classifier reads {classifier.accuracy:.1%} of the scans it was not trained on"]
    if len(images) < USUAL_COUNT:
        notes.append(f"the Frechet distance of {len(images)} images is higher than of {USUAL_COUNT:,}")
    return Report(images.source, len(images), "digits", len(scans), "the digits classifier", scores, notes)


def _digits_scores(classifier: DigitsClassifier, digits: Tensor, reference: Tensor) -> list[Score]:
    features, others = classifier.features(digits), classifier.features(reference)
    precision, recall = precision_recall(features, others, NEIGHBOURS)
    return [
        Score("frechet_distance", "Frechet distance", "lower", frechet_distance(features, others)),
        Score("precision", "precision", "higher", precision),
        Score("recall", "recall", "higher", recall),
        Score("inception_score", "Inception score", "higher", inception_score(classifier.probabilities(features))),
    ]


def _grey(pixels: Pixels, source: str) -> Tensor:
    """[n, 8, 8, C] 8-bit -> [n, 1, 8, 8] in [-1, 1]."""
    if (pixels != pixels[..., :1]).any():
        raise EvaluationError(f"{source}: images with colours, expected grey digits")
    return from_pixels(pixels[..., :1])


# ------------------------------------------------------------------------------------------------ all other images
def compare(
    images: ImageSet,
    reference: ImageSet,
    inception: Inception,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Report:
    """FID, sFID, Inception score, precision and recall, as ADM's evaluator defines them.

    A reference batch of ADM's brings mean and covariance of the whole training set (``mu``, ``sigma``, ``mu_s``, ``sigma_s``)
    beside images for precision and recall; those are taken. ADM's evaluator computes distances in fp16 where they fit, and
    this one in fp64: precision and recall may differ a little.

    Raises:
        EvaluationError: too few images, of other sizes than the reference's, or one that cannot be read.
        TypeError: an argument of the wrong kind; the message names it.
    """
    check_type("images", images, ImageSet, AN_IMAGE_SET)
    check_type("reference", reference, ImageSet, AN_IMAGE_SET)
    if not callable(getattr(inception, "features", None)):
        raise TypeError(f"inception: got {describe(inception)}, expected an Inception")
    batch_size = as_int("batch_size", batch_size, 1)
    check_callable("on_batch", on_batch)
    _expect_size(images, reference.shape[1:3])
    _expect_count(images, POOLED + 1, f"a covariance of {POOLED:,} features")
    known = _known_statistics(reference)
    if known is None:
        _expect_count(reference, POOLED + 1, f"a covariance of {POOLED:,} features")
    else:
        _expect_count(reference, NEIGHBOURS + 1, f"{NEIGHBOURS} neighbours of each, for precision and recall")
    found = inception.features(images, batch_size, on_batch)
    others = inception.features(reference, batch_size, on_batch)
    pooled, spatial = known or (gaussian(others.pooled), gaussian(others.spatial))
    precision, recall = precision_recall(found.pooled, others.pooled, NEIGHBOURS)
    scores = [
        Score("fid", "FID", "lower", _distance(found.pooled, pooled)),
        Score("sfid", "sFID", "lower", _distance(found.spatial, spatial)),
        Score("inception_score", "Inception score", "higher", inception_score(found.probabilities)),
        Score("precision", "precision", "higher", precision),
        Score("recall", "recall", "higher", recall),
    ]
    notes = []
    if len(images) < PAPERS_COUNT:
        notes.append(f"FID of {len(images):,} images is higher than of the {PAPERS_COUNT:,} that papers report")
    if known is not None:
        notes.append(f"FID and sFID are to the mean and covariance stored in {reference.source}")
    return Report(images.source, len(images), reference.source, len(reference), inception.name, scores, notes)


def _distance(features: Tensor, reference: Gaussian) -> float:
    found, reference = (Gaussian(*(part.cpu() for part in known)) for known in (gaussian(features), reference))
    return frechet_distance(found, reference)


def _known_statistics(reference: ImageSet) -> tuple[Gaussian, Gaussian] | None:
    """Of pooled and of spatial features, where a file brings them."""
    path = Path(reference.source)
    if path.suffix != ".npz" or (mean := npz_array(path, "mu")) is None:
        return None
    arrays = [mean, *(npz_array(path, name) for name in ("sigma", "mu_s", "sigma_s"))]
    shapes = [None if array is None else array.shape for array in arrays]
    expected = [(POOLED,), (POOLED, POOLED), (SPATIAL,), (SPATIAL, SPATIAL)]
    if shapes != expected:
        raise EvaluationError(f"{path}: mu, sigma, mu_s, sigma_s have the shapes {shapes}, expected {expected}")
    tensors = [torch.tensor(array, dtype=torch.float64) for array in arrays]
    return Gaussian(*tensors[:2]), Gaussian(*tensors[2:])


# ------------------------------------------------------------------------------------------------ what is expected
def _expect_size(images: ImageSet, size: tuple[int, int]) -> None:
    if images.shape[1:3] != size:
        came, expected = (f"{width}x{height}" for height, width in (images.shape[1:3], size))
        raise EvaluationError(f"{images.source}: images of {came} pixels, expected {expected}")


def _expect_count(images: ImageSet, least: int, why: str) -> None:
    if len(images) < least:
        raise EvaluationError(f"{images.source}: {len(images):,} images, expected {least:,} or more ({why})")
