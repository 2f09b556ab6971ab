"""Diffusion and flow matching: noise schedules and paths, the training losses and the denoising steps."""

from .flow import FlowMatching
from .gaussian import GaussianDiffusion
from .schedule import NUM_TRAIN_STEPS, betas, respaced_timesteps
from .solvers import SOLVERS, Step, Update, apply_update, steps

__all__ = [
    "NUM_TRAIN_STEPS",
    "SOLVERS",
    "FlowMatching",
    "GaussianDiffusion",
    "Step",
    "Update",
    "apply_update",
    "betas",
    "respaced_timesteps",
    "steps",
]
