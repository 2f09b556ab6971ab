"""Noise schedules and the subsets of their steps that a sampler visits.

Sources: Ho et al. 2020 (linear betas), Nichol & Dhariwal 2021 (cosine betas, strided subsets), Song et al. 2021 (DDIM strides).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..argument_checks import as_int, as_list, check_choice, describe

NUM_TRAIN_STEPS = 1000
BETA_SCHEDULES = ("linear", "cosine")


def betas(name: str) -> Tensor:
    """[1000] float64: the variance that each noising step adds."""
    check_choice("betas", name, BETA_SCHEDULES)
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, NUM_TRAIN_STEPS, dtype=torch.float64, device="cpu")
    time = torch.arange(NUM_TRAIN_STEPS + 1, dtype=torch.float64, device="cpu") / NUM_TRAIN_STEPS
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def respaced_timesteps(respacing: str | Sequence[int] | None) -> list[int]:
    """The original steps 0..999 that are kept, ascending.

    Args:
        respacing: None keeps all; ``"250"`` keeps that many, evenly spread from first to last; ``"10,15,20"`` cuts the
            steps in as many equal sections and spreads each count over its own; ``"ddim50"`` keeps every 20th from 0 on;
            a sequence of integers is the list itself.
    """
    if respacing is None:
        return list(range(NUM_TRAIN_STEPS))
    if isinstance(respacing, str):
        return _ddim(respacing) if respacing.startswith("ddim") else _sections(respacing)
    expected = "like '250', '10,15,20', 'ddim50' or a list of steps"
    steps = [as_int("respacing", step, 0, NUM_TRAIN_STEPS - 1) for step in as_list("respacing", respacing, expected)]
    if not steps:
        raise ValueError(f"respacing: got {respacing!r}, expected integers in 0..{NUM_TRAIN_STEPS - 1}")
    if len(set(steps)) != len(steps):
        raise ValueError(f"respacing: got {respacing!r}, expected every step at most once")
    return sorted(steps)


def _ddim(respacing: str) -> list[int]:
    count = _counts(respacing, respacing.removeprefix("ddim"))
    for stride in range(1, NUM_TRAIN_STEPS + 1):
        steps = range(0, NUM_TRAIN_STEPS, stride)
        if [len(steps)] == count:
            return list(steps)
    raise ValueError(f"respacing: got {respacing!r}, but no whole stride over {NUM_TRAIN_STEPS} steps keeps {count[0]}")


def _sections(respacing: str) -> list[int]:
    counts = _counts(respacing, respacing)
    short, longer_sections = divmod(NUM_TRAIN_STEPS, len(counts))
    steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = short + (i < longer_sections)
        if count > length:
            raise ValueError(f"respacing: got {respacing!r}, but section {i} has only {length} steps to keep {count} of")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        steps += [start + round(stride * k) for k in range(count)]
        start += length
    return steps


def _counts(respacing: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9][0-9]{0,3}\s*", part) for part in parts):
        raise ValueError(f"respacing: got {describe(respacing)}, expected like '250', '10,15,20', 'ddim50' or a list of steps")
    return [int(part) for part in parts]
