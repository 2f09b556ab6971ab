"""The CPU engine: a chain of sublayers in one call of a small C++ library, over packed weights."""

from .chain import CROSS_ATTENTION, MLP, SELF_ATTENTION, Context, Final, Products, Step
from .engine import found
from .int8 import Cost, forget, measure, unfit
from .packed import Linears

__all__ = [
    "CROSS_ATTENTION",
    "MLP",
    "SELF_ATTENTION",
    "Context",
    "Cost",
    "Final",
    "Linears",
    "Products",
    "Step",
    "forget",
    "found",
    "measure",
    "unfit",
]
