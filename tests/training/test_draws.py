"""A step's random numbers depend on the seed, the step and what they are for, and on nothing else."""

from __future__ import annotations

import torch

from ditfast.training.draws import PURPOSES, Draws

CPU = torch.device("cpu")


def test_the_same_key_draws_the_same_numbers_whatever_else_was_drawn() -> None:
    first = Draws(3, 7, 4, CPU).normal("noise", (2, 2))
    torch.rand(5)
    draws = Draws(3, 7, 4, CPU)
    draws.uniform("times")
    assert torch.equal(draws.normal("noise", (2, 2)), first)


def test_seed_step_and_purpose_each_change_them() -> None:
    drawn = [Draws(seed, step, 4, CPU).uniform("times") for seed in (0, 1) for step in (0, 1)]
    drawn += [Draws(0, 0, 4, CPU).uniform(purpose) for purpose in PURPOSES if purpose != "times"]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn)


def test_they_are_what_they_are_called() -> None:
    uniform = Draws(0, 0, 10_000, CPU).uniform("times")
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
    normal = Draws(0, 0, 10_000, CPU).normal("noise", ())
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
