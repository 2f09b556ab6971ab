"""Old name of ``ditfast.dispatch.shapes``, for one release."""

from __future__ import annotations

import warnings

from .dispatch.shapes import OpShape as Problem

__all__ = ["Problem"]

warnings.warn("ditfast.problem is ditfast.dispatch.shapes now, Problem is OpShape", DeprecationWarning, stacklevel=2)
