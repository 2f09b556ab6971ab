"""The digits as data."""

from __future__ import annotations

from torch import Tensor

from ...digits import real_digits
from .records import DataError, Record


class Digits:
    """Scikit-learn's 1,797 scans, [1, 8, 8] fp32 in [-1, 1]; never mirrored, as a mirrored digit is none.

    Raises:
        DataError: scikit-learn is not installed.
    """

    input_shape = (1, 8, 8)
    num_classes = 10
    image_size = 8
    class_names = tuple("0123456789")

    def __init__(self) -> None:
        try:
            self.images, self.labels = real_digits()
        except ImportError as error:
            raise DataError("digits: need scikit-learn: pip install scikit-learn") from error
        self.fingerprint = f"digits {len(self)}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], int(self.labels[index]))

    def clean(self, values: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        return values
