"""The CPU engine: a chain of sublayers in one call of a small C++ library, over packed weights."""

from .engine import (
    CROSS_ATTENTION,
    MLP,
    SELF_ATTENTION,
    Final,
    Products,
    Step,
    found,
    linear_of_few,
    run,
    runs_on,
    takes,
)
from .int8 import Cost, check, forget, measure, unfit
from .packed import Linears

__all__ = [
    "CROSS_ATTENTION",
    "MLP",
    "SELF_ATTENTION",
    "Cost",
    "Final",
    "Linears",
    "Products",
    "Step",
    "check",
    "forget",
    "found",
    "linear_of_few",
    "measure",
    "run",
    "runs_on",
    "takes",
    "unfit",
]
