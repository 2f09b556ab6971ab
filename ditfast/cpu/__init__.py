"""The CPU engine: a chain of sublayers in one call of a small C++ library, over packed weights."""

from .engine import CROSS_ATTENTION, MLP, SELF_ATTENTION, Final, Products, Step, found, run, runs_on, takes
from .int8 import check, measure
from .packed import Linears

__all__ = [
    "CROSS_ATTENTION",
    "MLP",
    "SELF_ATTENTION",
    "Final",
    "Linears",
    "Products",
    "Step",
    "check",
    "found",
    "measure",
    "run",
    "runs_on",
    "takes",
]
