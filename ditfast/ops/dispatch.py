"""Old name of ``ditfast.dispatch``, for one release."""

from __future__ import annotations

import warnings

from ..dispatch.selection import choose

__all__ = ["choose"]

warnings.warn(
    "ditfast.ops.dispatch is ditfast.dispatch now; choose is in its module selection", DeprecationWarning, stacklevel=2
)
