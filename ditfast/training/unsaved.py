"""Steps that no checkpoint holds: what Ctrl-C tells about them."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROBE_BYTES = 8 * 2**20


class Unsaved:
    """Steps since the newest checkpoint, and how long another one of ``state_bytes`` takes."""

    def __init__(self, folder: Path, state_bytes: int):
        self.folder, self.state_bytes = folder, state_bytes
        self.saving_seconds: float | None = None  # of the last checkpoint that was written
        self._step_seconds = 0.0
        self.begin(None)

    def begin(self, newest: Path | None) -> None:
        """Count from here, where ``newest`` holds everything."""
        self.newest, self.steps = newest, 0
        self._since = self._step_end = time.monotonic()

    def count_step(self) -> None:
        now = time.monotonic()
        self.steps += 1
        self._step_seconds, self._step_end = now - self._step_end, now

    @contextmanager
    def saving(self, path: Path) -> Iterator[None]:
        """Time the block, which writes the checkpoint ``path``."""
        start = time.monotonic()
        yield
        self.begin(path)
        self.saving_seconds = self._since - start

    def describe_interrupt(self, last: bool, resume: str) -> str:
        """Return what the first Ctrl-C does, or what the last one costs; ``resume`` names what goes on with a run."""
        steps = f"{self.steps} step{'s' * (self.steps != 1)} ({describe_seconds(time.monotonic() - self._since)})"
        since = "taken so far" if self.newest is None else f"since {self.newest}"
        if last:
            rest = "no checkpoint is there" if self.newest is None else f"{resume} goes on from it"
            return f"interrupted at once; lost: {steps} {since}; {rest}"
        seconds = self._estimate()
        about = "in a few seconds" if seconds is None else f"in about {describe_seconds(seconds)}"
        return f"Ctrl-C: writes a checkpoint behind this step and ends, {about}; once more loses {steps} {since}"

    def _estimate(self) -> float | None:
        """Return seconds of a step and a checkpoint, whose time is the last one's, or by its size and a probe of the disk."""
        saving = self.saving_seconds
        if saving is None:
            probe = _write_seconds(self.folder)
            saving = None if probe is None else probe * self.state_bytes / PROBE_BYTES
        return None if saving is None else self._step_seconds + saving


def describe_seconds(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(1, round(seconds))} s"


def _write_seconds(folder: Path) -> float | None:
    """Return the time of a small file's way to the disk and its hash; None if it cannot be written."""
    content = os.urandom(PROBE_BYTES)
    start = time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return None
    hashlib.sha256(content)
    return time.monotonic() - start
