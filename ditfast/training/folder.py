"""A run's folder: what the run is, so that no other goes on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import whole_file
from ..sampling.settings import differences, versions
from .errors import RunError

RECORD = "run.json"


def claim(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Makes the run's folder, or finds that it is this run's.

    Args:
        folder: made if it does not exist.
        settings: whatever decides the weights, as JSON takes it.
        resume: whether an earlier run with the same settings may be there.

    Raises:
        RunError: it cannot be written, is a file, holds something else or another run, or this run while ``resume`` is False.
    """
    record = folder / RECORD
    written = json.dumps({"settings": settings, "versions": versions()}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
            if names:
                raise RunError(f"{folder}: holds {names[0]} and no {RECORD}, expected an empty folder or an earlier run's")
            with whole_file(record, keep=True) as temporary:
                temporary.write_text(written, "utf-8")
        elif not resume:
            raise RunError(f"{folder}: holds a run already; --resume auto goes on with it")
        _check_same(record, json.loads(written)["settings"])
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"{folder}: a file is in the way") from error
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _check_same(record: Path, settings: Mapping[str, Any]) -> None:
    try:
        differing = differences(json.loads(record.read_text("utf-8"))["settings"], settings)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{record}: does not hold a run's settings") from error
    if differing:
        raise RunError(f"{record.parent}: holds a run with other settings: {differing}")
