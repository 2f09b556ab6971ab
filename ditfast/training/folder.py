"""A run's folder: what the run is, so that no other goes on in it."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from ..files import check_room, whole_file
from ..sampling.folder import RECORD, check_content
from ..sampling.ranks import Ranks
from ..sampling.settings import differences, versions
from .errors import PYTHON, Caller, RunError
from .parallel import told

LOCK = ".lock"
WITH_CHECKPOINTS = "checkpoints, with --keep of them on the disk and one that is being written,"


@contextmanager
def claimed(
    folder: Path, settings: Mapping[str, Any], resume: bool, ranks: Ranks, needed: int = 0, caller: Caller = PYTHON
) -> Iterator[None]:
    """The first of all ranks claims the folder, as ``claim`` does, and while the block runs no other process gets in.

    Raises:
        RunError: on every rank: as ``claim`` does; another process trains in the folder; or the ranks' settings differ.
    """
    with ExitStack() as stack:
        refusal = None
        if ranks.rank == 0:
            try:
                claim(folder, settings, resume, needed, caller)
                stack.enter_context(_alone_in(folder))
            except RunError as error:
                refusal = str(error)
        answers = told((settings, refusal))
        first, refusal = answers[0]
        if refusal is not None:
            raise RunError(refusal)
        for rank, (others, _) in enumerate(answers):
            if differing := differences(first, others):
                raise RunError(f"rank {rank} was given another run than rank 0: {differing}")
        yield


def claim(folder: Path, settings: Mapping[str, Any], resume: bool, needed: int = 0, caller: Caller = PYTHON) -> None:
    """Makes the run's folder, or finds that it is this run's: the settings, which JSON takes, decide the weights.

    An earlier run may be there if ``resume``; the checkpoints to come take ``needed`` bytes at most. Errors tell ``caller`` how
    to go on with a run.

    Raises:
        RunError: it cannot be written, is a file, holds something else or another run, or this run while ``resume`` is False;
            or the disk has too little room.
    """
    record = folder / RECORD
    written = json.dumps({"settings": settings, "versions": versions()}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = record.exists()
        if there and not resume:
            raise RunError(f"{folder}: holds a run already; {caller.resume} goes on with it")
        check_content(record, written, RunError)
        check_room(folder, needed, WITH_CHECKPOINTS)
        if not there:
            with whole_file(record, keep=True) as temporary:
                temporary.write_text(written, "utf-8")
            check_content(record, written, RunError)  # of two runs that begin at once, one is first
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"{folder}: a file is in the way") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> RunError:
    return RunError(f"{folder}: cannot be written: {error.strerror or error}")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Ranks whose torchrun was killed go on for a while: two runs would mix their lines and remove each other's files."""
    try:
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RunError(f"{folder}: another process is training in it") from error
            # else a file system without locks
        yield


def _lock(file: IO[str]) -> None:
    """Until the file is closed; on Windows it is not locked."""
    if sys.platform != "win32":
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which processes that read data would inherit
