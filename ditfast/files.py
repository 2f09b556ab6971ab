"""Files and folders that appear whole or not at all, however a process ends."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"
# Of Windows, macOS, Synology and ext4. macOS's ._NAME beside NAME and .DS_Store are hidden by their names.
LEFT_BEHIND = {
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
NO_HOME = Path("/nonexistent")  # as Debian calls it


def cache_folder(name: str) -> Path:
    """The user's, for what a name stands for; perhaps not there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "ditfast" / name


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user whom the system does not know, as in containers, without HOME
        return NO_HOME


def visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder in the order of names, without hidden entries and what systems and disks leave behind."""
    return sorted((entry for entry in os.scandir(folder) if not _is_left_behind(entry.name)), key=lambda entry: entry.name)


def _is_left_behind(name: str) -> bool:
    return name.startswith(".") or name.casefold() in LEFT_BEHIND


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


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: two processes may now replace each other's file
        if not path.exists():
            temporary.replace(path)
