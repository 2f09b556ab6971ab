"""What ends a run early, and how messages about it name things."""

from __future__ import annotations

from typing import NamedTuple


class Caller(NamedTuple):
    """Names in messages: the program that trains, and what goes on with a run."""

    program: str = "Trainer"
    resume: str = "run(resume=True)"


PYTHON = Caller()


class RunError(ValueError):
    """A run that cannot begin or go on in its folder, or with these arguments: why, on one line, before the first step."""


class TrainingStopped(RuntimeError):
    """A run that ended early: at which step and why; its checkpoints are whole."""


class TrainingInterrupted(TrainingStopped):
    """A run that Ctrl-C ended, behind a step and with a checkpoint."""
