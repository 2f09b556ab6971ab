"""Data by the name that a user gives."""

from __future__ import annotations

from .digits import Digits
from .records import Data, DataError

DIGITS = "digits"


def open_data(source: str) -> Data:
    """The data that ``source`` names.

    Args:
        source: ``"digits"``.

    Raises:
        DataError: there is no such data.
    """
    if source == DIGITS:
        return Digits()
    raise DataError(f"data: {source}: there is no such folder")
