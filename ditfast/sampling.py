"""The denoising loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .diffusion import GaussianDiffusion
from .model import DiT


def initial_noise(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """[count, C, H, W] fp32 normal noise; image k of a seed is the same whatever the count."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected 0..2^64-1")
    keys = [np.array([seed, k], dtype=np.uint64) for k in range(count)]
    images = [np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32) for key in keys]
    return torch.from_numpy(np.stack(images)) if images else torch.empty(0, *shape)


@torch.inference_mode()
def sample(
    model: DiT,
    diffusion: GaussianDiffusion,
    labels: Tensor,
    *,
    cfg_scale: float = 1.0,
    seed: int = 0,
    clip: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoises one image for each label, with deterministic DDIM steps over ``diffusion.timesteps``.

    Args:
        model: in eval mode, on any device, of any of its dtypes; the state between steps is fp32.
        diffusion: the steps to take.
        labels: [B] integer classes.
        cfg_scale: strength of classifier-free guidance; 1 runs the conditional model alone.
        seed: of the initial noise.
        clip: clamp the predicted x_0 to [-1, 1] (pixel-space models).
        on_step: called after each step (progress).

    Returns:
        [B, C, H, W] fp32 on the model's device.
    """
    device, dtype = model.pos_embed.device, model.pos_embed.dtype
    labels = labels.to(device)
    guided = cfg_scale != 1.0
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.config.null_class)])
    x = initial_noise(model.config.input_shape, len(labels) // (2 if guided else 1), seed).to(device)
    for step in reversed(diffusion.timesteps):
        t = torch.full((len(labels),), step, device=device)
        if guided:
            output = model.forward_with_cfg(torch.cat([x, x]).to(dtype), t, labels, cfg_scale).chunk(2)[0]
        else:
            output = model(x.to(dtype), t, labels)
        x = diffusion.ddim_step(output, x, t[: len(x)], clip=clip)
        on_step()
    return x
