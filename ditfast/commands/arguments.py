"""Types of arguments, each of which says in its error what came and what was expected; and what commands do with them."""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..argument_checks import LARGEST_FP32, LARGEST_SEED, describe
from ..model import DiT
from ..sampling.ranks import Ranks
from ..terminal import say

LARGEST_INT = 2**63 - 1  # that a tensor holds
MOST_IN_BATCH = 2**20
MOST_PIXELS = 2**14  # along a side: more tokens than any model takes


class BadArgument(ValueError):
    """An argument that only the model, the machine or another argument makes wrong."""


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST_FP32:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number, in fp32's range")
    return value


def seed(text: str) -> int:
    return integer(text, 0, LARGEST_SEED, "an integer 0..2^64-1")


def positive(text: str) -> int:
    return integer(text, 1, LARGEST_INT, "a positive integer")


def natural(text: str) -> int:
    return integer(text, 0, LARGEST_INT, "an integer, 0 or more")


def batch_size(text: str) -> int:
    return integer(text, 1, MOST_IN_BATCH, f"a positive integer up to {MOST_IN_BATCH}")


def image_size(text: str) -> int:
    return integer(text, 1, MOST_PIXELS, f"a positive integer up to {MOST_PIXELS}")


def integer(text: str, least: int, most: int, expected: str) -> int:
    """Return the number that digits stand for, within a range."""
    if not re.fullmatch("[0-9]{1,20}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"got {describe(text)}, expected {expected}")
    return int(text)


def ranks_from_environment() -> Ranks:
    """Return which process of how many this is.

    Raises:
        BadArgument: a variable of the environment is no number, or is out of range.
    """
    try:
        return Ranks.from_environment()
    except ValueError as error:
        raise BadArgument(str(error)) from error


@contextmanager
def warnings_on_one_line(command: str, ranks: Ranks) -> Iterator[None]:
    """They say what is wrong with somebody's files: where in the code that was found tells nobody more."""
    before = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is not UserWarning:
            return before(message, category, *place, **line)
        return f"{_prefix(command, ranks)}: warning: {message}\n"

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def ended(command: str, ranks: Ranks, message: str, status: int) -> int:
    """The exit status, after one line on stderr, written at once: ranks share it."""
    sys.stderr.write(f"{_prefix(command, ranks)}: {message}\n")
    return status


def _prefix(command: str, ranks: Ranks) -> str:
    return f"ditfast {command} (rank {ranks.rank})" if ranks.world > 1 else f"ditfast {command}"


def say_which(checkpoint: str, model: DiT, ranks: Ranks) -> None:
    """Print on the first rank which weights a run's folder stood for."""
    if ranks.rank == 0 and model.source is not None and model.source.path != checkpoint:
        say(str(model.source))
