"""Predicted times of ops and models on GPUs, computed from shapes, static counts and listed assumptions; nothing is run."""

from .assumptions import ASSUMPTIONS, Assumption
from .devices import spec_of
from .models import PredictedOp, predicted_model_ms, predicted_ops
from .problems import ROUTES, predicted_ms

__all__ = [
    "ASSUMPTIONS",
    "ROUTES",
    "Assumption",
    "PredictedOp",
    "predicted_model_ms",
    "predicted_ms",
    "predicted_ops",
    "spec_of",
]
