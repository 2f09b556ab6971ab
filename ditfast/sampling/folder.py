"""A run of N files into a folder: killed at any moment and started again, it makes the missing ones, the same bytes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..files import PART, check_room, visible_entries, whole_file
from ..images import Pixels, save_png
from .ranks import Ranks
from .settings import differences

RECORD = "run.json"
_ROOM_OF_A_FILE = 4096  # beside its pixels: a block of the file system, which also holds what zlib may add


class FolderError(ValueError):
    """A folder that the run cannot go into: which one and why, on one line, before the first step."""


class RunStopped(RuntimeError):
    """A run that ended early; every file there is whole, and the same run goes on from there."""


def check_content(record: Path, written: str, error: type[ValueError]) -> None:
    """Raise unless a run's folder holds nothing but the run whose ``record`` would be written, or nothing at all."""
    folder = record.parent
    names = [entry.name for entry in visible_entries(folder)]
    if not record.exists():  # looked for last: it comes into being before any other file
        if names:
            raise error(f"{folder}: holds {names[0]} and no {record.name}, expected an empty folder or an earlier run's")
        return
    try:
        differing = differences(json.loads(record.read_text("utf-8"))["settings"], json.loads(written)["settings"])
    except (ValueError, LookupError, TypeError, AttributeError) as fault:
        raise error(f"{record}: does not hold a run's settings") from fault
    if differing:
        raise error(f"{folder}: holds a run with other settings: {differing}; give another folder")


class RunFolder:
    """Files 0..num-1 as ``000000.png``, ``000001.png`` and so on, and a record, which says how they are made.

    Files come into being in blocks, numbers 0..batch-1, then batch..2*batch-1 and so on, which never depend on what is there
    already or on the number of ranks: a file has the same neighbours in every run.

    Args:
        path: made if it does not exist.
        num: of files.
        batch: files in a block.
    """

    suffix: ClassVar[str]
    content: ClassVar[str]  # what each file is, for messages
    record: ClassVar[str] = RECORD

    def __init__(self, path: Path, num: int, batch: int):
        self.path = path
        self.blocks = [range(start, min(start + batch, num)) for start in range(0, num, batch)]
        self._digits = max(6, len(str(num - 1)))

    def file(self, number: int) -> Path:
        return self.path / f"{number:0{self._digits}d}{self.suffix}"

    def missing(self) -> list[int]:
        there = {entry.name for entry in os.scandir(self.path)}
        return [number for block in self.blocks for number in block if self.file(number).name not in there]

    def claim(self, settings: Mapping[str, Any], about: Mapping[str, Any], file_bytes: int, other_bytes: int = 0) -> None:
        """Makes this run's folder of it, or finds that it is, from an earlier one.

        Args:
            settings: whatever decides a file's bytes, as JSON takes it; an earlier run's have to be the same.
            about: to be written down with them, but not compared.
            file_bytes: of one file's content.
            other_bytes: of what else is to come into the folder.

        Raises:
            FolderError: it cannot be written, is a file, holds something else or other settings' files, or the disk has too
                little room.
        """
        written = json.dumps({"settings": settings, "about": about}, indent=2) + "\n"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            check_content(self.path / self.record, written, FolderError)
            with tempfile.TemporaryFile(dir=self.path, prefix=".") as probe:
                probe.write(bytes(_ROOM_OF_A_FILE))
            needed = len(self.missing()) * (file_bytes + _ROOM_OF_A_FILE) + other_bytes
            check_room(self.path, needed, f"{self.content}s")
            with whole_file(self.path / self.record, keep=True) as record:
                record.write_text(written, "utf-8")
            check_content(self.path / self.record, written, FolderError)  # of two runs that begin at once, one is first
        except (FileExistsError, NotADirectoryError) as error:
            raise FolderError(f"{self.path}: a file is in the way") from error
        except OSError as error:
            raise FolderError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def unfinished(self, ranks: Ranks) -> list[range]:
        """The blocks of which a file is missing, those of them that are this rank's: ranks take blocks in turns."""
        missing = set(self.missing())
        return [block for block in self.blocks[ranks.rank :: ranks.world] if not missing.isdisjoint(block)]

    def write_once(self, name: str, write: Callable[[Path], None]) -> None:
        """Another file of the run, unless it is there.

        Raises:
            RunStopped: the disk is full, or fails.
        """
        path = self.path / name
        if path.exists():
            return
        try:
            write(path)
        except OSError as error:
            if path.exists():  # another process of the same run has been here, and tidied up
                return
            rest = f"every {self.content} there is whole, and the same command goes on from here"
            raise RunStopped(f"{path}: {error.strerror or error}; {rest}") from error

    def tidy(self) -> None:
        """Removes what killed processes left half-written, once everything is there."""
        for leftover in self.path.glob(f".*{PART}"):
            leftover.unlink(missing_ok=True)


class ImageFolder(RunFolder):
    """Images as PNG files."""

    suffix = ".png"
    content = "image"

    def fill(self, blocks: Iterable[range], paint: Callable[[range], Pixels]) -> None:
        """Make whole blocks by ``paint``, which returns images [n, height, width, C] 8-bit, and write those that are missing.

        Raises:
            RunStopped: the disk is full, or fails.
        """
        for block in blocks:
            for number, pixels in zip(block, paint(block), strict=True):
                self.write_once(self.file(number).name, partial(save_png, pixels=pixels))
