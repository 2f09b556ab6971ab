"""A small classifier of 8x8 digits, trained here in seconds: what Inception is to photographs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..digits import real_digits
from ..images import from_pixels, to_pixels
from ..threads import one_thread
from .metrics import Gaussian, frechet_distance, gaussian

FEATURES = 32
STEPS = 500
BATCH = 128
PEAK_RATE = 3e-3
NOISE = 0.2  # of images in [-1, 1]; without it the scans that were learnt by heart look unlike all others
HELD_OUT = 360


@dataclass(frozen=True)
class DigitsClassifier:
    """An MLP, 64 - 128 - 32 - 10, in float64 on the CPU."""

    trunk: nn.Module  # [N, 64] in [-1, 1] -> features [N, 32]
    head: nn.Module  # features -> logits [N, 10]
    accuracy: float  # on the 360 scans that it was not trained on

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[N, 1, 8, 8] in [-1, 1] -> [N, 32] float64: the last hidden layer."""
        return self.trunk(images.double().flatten(1))

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """[N, 10] float64, of the ten digits."""
        return self.head(features).softmax(dim=1)


@functools.cache
def digits_classifier() -> DigitsClassifier:
    """Trained on 1,437 of the 1,797 scans; needs scikit-learn, and one or two seconds of one core.

    Seeded and in float64, so that machines whose sums round differently come to the same features in all but the last digits.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), one_thread(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        scans, labels = scans_as_images()
        held_out, taught = torch.randperm(len(scans), generator=generator).split([HELD_OUT, len(scans) - HELD_OUT])
        linear = partial(nn.Linear, dtype=torch.float32)  # whatever the default is: this result stays
        trunk = nn.Sequential(linear(64, 128), nn.GELU(), linear(128, FEATURES), nn.GELU()).double()
        head = linear(FEATURES, 10).double()
        parameters = [*trunk.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=STEPS)
        for _ in range(STEPS):
            batch = taught[torch.randint(len(taught), (BATCH,), generator=generator)]
            images = scans[batch].double().flatten(1)
            noise = NOISE * torch.randn(images.shape, generator=generator, dtype=torch.float64)
            loss = F.cross_entropy(head(trunk(images + noise)), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        trunk.requires_grad_(False)
        head.requires_grad_(False)
        read = head(trunk(scans[held_out].double().flatten(1))).argmax(dim=1)
        return DigitsClassifier(trunk, head, (read == labels[held_out]).double().mean().item())


def scans_as_images() -> tuple[Tensor, Tensor]:
    """The real scans [1797, 1, 8, 8] in [-1, 1], rounded to 8 bits as an image file's pixels are, and labels [1797]."""
    scans, labels = real_digits()
    return from_pixels(to_pixels(scans)), labels


def digits_quality(images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The Frechet distance to the real scans, and the share that is read as the digit asked for; needs scikit-learn.

    Args:
        images: [N, 1, 8, 8] in [-1, 1], rounded here to 8 bits; N >= 2.
        labels: [N] integers, the digits asked for.
    """
    classifier = digits_classifier()
    features = classifier.features(from_pixels(to_pixels(images)))
    read = classifier.probabilities(features).argmax(dim=1)
    return frechet_distance(features, _scans_gaussian()), (read == labels.cpu()).double().mean().item()


@functools.cache
def _scans_gaussian() -> Gaussian:
    return gaussian(digits_classifier().features(scans_as_images()[0]))
