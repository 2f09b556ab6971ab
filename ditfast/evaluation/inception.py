"""Features of torch-fidelity's Inception V3, laid out as ADM's evaluator has them (Dhariwal & Nichol 2021)."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..argument_checks import check_type
from ..checkpoints.runs import sha256
from ..devices import with_index
from .errors import EvaluationError, one_line
from .image_set import ImageSet

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # how it begins
POOLED = 2048  # features of an image
SPATIAL_CHANNELS = 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS
BYTES_PER_IMAGE = 4 * 2 * 64 * 147 * 147  # of a batch: fp32, in and out of the batch norm that holds most


class Features(NamedTuple):
    pooled: Tensor  # [N, 2048] fp32: of FID, precision and recall
    spatial: Tensor  # [N, 2023] fp32: of sFID (Nash et al. 2021)
    probabilities: Tensor  # [N, 1008] fp32: of the Inception score; from logits without bias, as in ADM's evaluator


class Inception:
    """The network of 2015 that FID is defined by, which resizes images to 299x299 as TensorFlow 1 did.

    Args:
        weights: a file; by default where torch.hub keeps it. Nothing is downloaded.
        device: where it runs.

    Raises:
        EvaluationError: no torch-fidelity, or no such file; the message says how to get it.
    """

    def __init__(self, weights: str | os.PathLike[str] | None, device: torch.device | str):
        check_type("weights", weights, (str, os.PathLike, type(None)), "a path or None")
        check_type("device", device, (torch.device, str), "a device")
        library = _library()
        path = _checked(Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2])
        outputs = ["2048", "logits_unbiased"]
        network = library.FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=str(path))
        self.device = with_index(device)
        self.network = network.to(self.device)
        self.name = f"Inception V3 of torch-fidelity {library.__version__}"
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)  # TensorFlow's mixed_6/conv

    @torch.inference_mode()
    def features(self, images: ImageSet, batch_size: int, on_batch: Callable[[int], None] = lambda count: None) -> Features:
        """Of all images; ``on_batch`` is told how many more are done."""
        parts = []
        for pixels in images.batches(batch_size):
            batch = torch.tensor(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(self.device)
            pooled, logits = self.network(batch)
            parts.append(Features(pooled, self._spatial, logits.softmax(dim=1)))
            on_batch(len(pixels))
        return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        """[n, 192, 17, 17] -> [n, 2023]: the first 7 channels, channels last as in TensorFlow."""
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _library() -> Any:
    try:
        return importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, which it imports, was built for another torch
        raise EvaluationError(
            "FID of images other than digits needs torch-fidelity, which cannot be imported "
            f"({one_line(error)}): pip install 'ditfast[eval]'"
        ) from error


def _checked(path: Path) -> Path:
    if not path.is_file():
        get = f"curl -L --create-dirs -o {shlex.quote(str(path))} {URL}"
        raise EvaluationError(f"{path}: no such file, expected Inception's weights; get them once: {get}")
    begins = sha256(path)[:8]
    if begins != SHA256:
        raise EvaluationError(f"{path}: its SHA-256 begins with {begins}, expected {SHA256}: not the weights of {URL}")
    return path
