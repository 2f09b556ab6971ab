"""The CPU engine: a chain of sublayers in one call of a small C++ library, over packed weights."""

from .chain import CROSS_ATTENTION, MLP, SELF_ATTENTION, Context, Final, Products, Step
from .dispatch import found, int8_weights_linear, linear_of_few, run, runs_on, takes
from .int8 import Cost, check, forget, measure, unfit
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
    "check",
    "forget",
    "found",
    "int8_weights_linear",
    "linear_of_few",
    "measure",
    "run",
    "runs_on",
    "takes",
    "unfit",
]
