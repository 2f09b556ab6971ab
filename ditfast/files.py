"""Files and folders that appear whole or not at all, however a process ends."""

from __future__ import annotations

import errno
import itertools
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"
# Of Windows, macOS, Synology and ext4. macOS's ._NAME beside NAME and .DS_Store are hidden by their names.
LEFT_BEHIND = {
    *("$recycle.bin", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found"),
    *("system volume information", "thumbs.db"),
}
UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def cache_folder(name: str) -> Path:
    """The user's, for what a name stands for; perhaps not there yet."""
    try:
        home = Path.home()
    except RuntimeError:  # a user whom the system does not know, as in containers, without HOME
        home = Path("/nonexistent")  # as Debian calls it
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "ditfast" / name


def format_bytes(size: int, digits: int = 3) -> str:
    """Return a size in the unit that a person reads it in, such as ``410 kB``, rounded to three digits or more."""
    rounded = float(f"{size:.{digits - 1}e}")
    power = min(int(math.log10(max(rounded, 1))) // 3, len(UNITS) - 1)
    return f"{rounded / 1000**power:.{digits}g} {UNITS[power]}"


def check_room(path: Path, needed: int, content: str) -> None:
    """Raise OSError (ENOSPC) if a disk has too little room for files that are to be written.

    Args:
        path: of a file or folder, which need not exist yet.
        needed: bytes that the files take at most.
        content: what they hold, a plural for the message.
    """
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = ((format_bytes(needed, digits), format_bytes(free, digits)) for digits in range(3, 20))
        takes, has = next((both for both in sizes if both[0] != both[1]), (f"{needed} B", f"{free} B"))
        raise OSError(errno.ENOSPC, f"the {content} take up to {takes}, but {has} are free")


def visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder in the order of names, without hidden entries and what systems and disks leave behind."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name.casefold() not in LEFT_BEHIND]


def free_path(path: Path) -> Path:
    """Return the path, with a number behind its stem if there is something already."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


@contextmanager
def whole_file(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """A name beside ``path``; the file or folder made there takes the path's place, or goes if an exception ends the block.

    The name is hidden, ends in ``PART`` and is nobody else's, so that two processes may write the same file at once.

    Args:
        path: of the file, which may be there already, or of the folder, which may not, unless it is empty.
        keep: a file that is there already stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        yield temporary
        if keep:
            _link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def without_positions() -> Iterator[None]:
    """Raise what ended ``torch.save``, the system's error or Ctrl-C, where it raises the position that it expected to be at."""
    try:
        yield
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError | KeyboardInterrupt) else error from None


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: two processes may now replace each other's file
        if not path.exists():
            temporary.replace(path)
