"""The diffusion process: noise schedules, the training loss and the denoising steps."""

from .gaussian import GaussianDiffusion
from .schedule import NUM_TRAIN_STEPS, betas, respaced_timesteps

__all__ = ["NUM_TRAIN_STEPS", "GaussianDiffusion", "betas", "respaced_timesteps"]
