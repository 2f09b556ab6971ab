"""What data is: numbered records, read one by one on the CPU, and how a batch of them becomes what a model is trained on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class BadRecord(ValueError):
    """A record that cannot be read: its file, its place in it, and why, on one line."""


class DataError(ValueError):
    """Data that cannot be trained on as a whole: which, and why, on one line."""


class Record(NamedTuple):
    """One of the data's."""

    values: Tensor  # on the CPU, of the same shape and dtype in every record
    label: int  # 0..num_classes-1


class Data(Protocol):
    """Records 0..len-1; can be pickled, so that other processes read them."""

    input_shape: tuple[int, int, int]  # (C, H, W) of the latents, or pixels, that a model is trained on
    num_classes: int  # that labels may have
    fingerprint: str  # the same where the same records become the same latents, found without reading the records

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises ``BadRecord`` where the record cannot be read."""
        ...

    def clean(self, values: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        """x0 [b, C, H, W] fp32, of unit variance or in [-1, 1], on the device of ``values``.

        Args:
            values: [b, ...] of b records.
            flips: [b] bool, which of them are to be mirrored; data that must not be mirrored ignores it.
            noise: [b, C, H, W] fp32, normal, for data that is drawn anew each time it is seen.
        """
        ...
