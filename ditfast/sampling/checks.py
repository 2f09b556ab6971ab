"""Checks of what a sampler is given: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..argument_checks import LARGEST_SEED, as_float, as_guidance_scale, as_int, as_list, check_tensor, check_type, describe
from ..diffusion.solvers import Step
from .noise import Generators

_A_SOLVERS = "those of a solver, such as ditfast.diffusion.steps(process, 'ddpm')"


def check_steps(steps: Any) -> None:
    if not as_list("steps", steps, _A_SOLVERS):
        raise ValueError(f"steps: got none, expected {_A_SOLVERS}")
    for step in steps:
        check_type("steps", step, Step, _A_SOLVERS)


def as_interval(interval: Any) -> tuple[float, float]:
    """Return the ends of a guidance interval, which may be infinite."""
    expected = "a pair of times, the lower first"
    ends = as_list("cfg_interval", interval, expected)
    if len(ends) != 2:
        raise ValueError(f"cfg_interval: got {describe(interval)}, expected {expected}")
    low, high = (end if end in (-math.inf, math.inf) else as_float("cfg_interval", end) for end in ends)
    if low > high:
        raise ValueError(f"cfg_interval: got {describe(interval)}, expected {expected}")
    return low, high


def as_labels(labels: Any, rows: int, device: torch.device) -> Tensor:
    """Return labels [B] as int64 on a device; any integers will do, in a list, an array or a tensor."""
    expected = f"[B] integers 0..{rows - 1}"
    found = [as_int("labels", label, 0) for label in as_list("labels", labels, expected)]
    if found and max(found) >= rows:
        raise ValueError(f"labels: got {min(found)}..{max(found)}, expected 0..{rows - 1}")
    return torch.tensor(found, dtype=torch.int64, device=device)


def as_images(images: Any, count: int) -> list[int]:
    """Return the numbers of images, 0, 1, ... for None."""
    if images is None:
        return list(range(count))
    found = [as_int("images", image, 0, LARGEST_SEED) for image in as_list("images", images, "[B] integers 0..2^64-1")]
    if len(found) != count:
        raise ValueError(f"images: got {len(found)} numbers, expected {count}, one for each label")
    return found


def as_scales(cfg_scale: Any, count: int, device: torch.device) -> Tensor | None:
    """Return guidance scales [B] as fp32 on a device; None where nothing is guided."""
    scale = as_guidance_scale(cfg_scale, count, torch.empty(0, device="cpu"))  # a number, or [B, 1, 1, 1]
    values = scale.flatten().tolist() if isinstance(scale, Tensor) else [scale] * count
    scales = torch.tensor([as_float("cfg_scale", value) for value in values], dtype=torch.float32, device=device)
    return None if bool((scales == 1).all()) else scales


def as_latents(name: str, latents: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return latents of a shape as fp32 on a device."""
    expected = f"[{', '.join(map(str, shape))}]"
    check_tensor(name, latents, expected)
    if tuple(latents.shape) != tuple(shape) or not latents.is_floating_point():
        raise ValueError(f"{name}: got {describe(latents)}, expected {expected} of floats")
    return latents.detach().to(device, torch.float32)


def as_generators(generator: Any, count: int) -> Generators | None:
    """Return a generator, or a list of one for each image; None for None."""
    expected = f"a torch.Generator, or a list of {count}, one for each label"
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    generators = as_list("generator", generator, expected)
    for one in generators:
        check_type("generator", one, torch.Generator, expected)
    if len(generators) != count:
        raise ValueError(f"generator: got {len(generators)} of them, expected {expected}")
    return generators


def as_first_step(start_time: Any, starts: Sequence[tuple[int, float]]) -> int:
    """Return the index of the step that begins at a time, of those that a run may begin with; for None that is the first."""
    if start_time is None:
        return 0
    start_time = as_float("start_time", start_time)
    nearest = sorted(starts, key=lambda start: abs(start[1] - start_time))
    if not math.isclose(nearest[0][1], start_time, rel_tol=1e-6, abs_tol=1e-6):
        times = " or ".join(f"{time:g}" for _, time in nearest[:2])
        raise ValueError(f"start_time: got {start_time:g}, expected the time of a step, such as {times}")
    return nearest[0][0]
