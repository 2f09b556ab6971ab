"""What ends a run early."""


class RunError(ValueError):
    """A run that cannot begin or go on in its folder, or with these arguments: why, on one line, before the first step."""


class TrainingStopped(RuntimeError):
    """A run that ended early: at which step and why; its checkpoints are whole."""


class TrainingInterrupted(TrainingStopped):
    """A run that Ctrl-C ended, behind a step and with a checkpoint."""
