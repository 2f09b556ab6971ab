"""Ctrl-C in every command: one line on stderr, status 130, no process left behind.

Imports nothing of the package: it acts while that, and torch, are imported.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, NoReturn

SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides
STATUS = 130  # as shells report a process that SIGINT ended
GRACE = 2.0  # seconds after the first Ctrl-C in which others do not disturb its cleaning up; later ones end the process at once
PACKAGE = os.path.dirname(os.path.realpath(__file__))


class Announced(KeyboardInterrupt):
    """A Ctrl-C about which everything has been said."""


def run(name: str, command: Callable[[], int]) -> int:
    """Run a command; return its status, or 130 after Ctrl-C, one line about it and the end of all processes it started."""
    _said.clear()
    with _handling(_Interrupts(name)):
        try:
            return command()
        except KeyboardInterrupt as error:
            _say(name, error)
        end_children()
    return STATUS


@contextlib.contextmanager
def keeping(describe: Callable[[], str]) -> Iterator[None]:
    """Add to the line about a Ctrl-C in the block what was done and where it is; an inner block's words come before."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not error.args:
            with contextlib.suppress(OSError):
                error.args = (describe(),)
        raise


@contextlib.contextmanager
def shielding_children() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started in the block, which print tracebacks: this process ends them."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # else the first process unblocks the signal with the start of this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited, over exec too
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(number: int = signal.SIGINT, frame: Any = None) -> None:
    """End this process and its children at once, as a signal handler, where nothing is to be cleaned up."""
    leave_as(_NAME or "ditfast")


def leave_as(name: str) -> NoReturn:
    """End this process and its children without cleaning up, after one line in a command's name."""
    _say(name, KeyboardInterrupt())
    end_at_once()


def end_at_once() -> NoReturn:
    """End this process and its children without cleaning up."""
    end_children()
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        stream = sys.__stderr__
        if stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            stream.write(SHOW_CURSOR)
            stream.flush()
    os._exit(STATUS)


class _Interrupts:
    """Handler of SIGINT while a command runs."""

    def __init__(self, name: str):
        self.name = name
        self.first: float | None = None

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            raise KeyboardInterrupt
        if now - self.first > GRACE:
            leave_as(self.name)


@contextlib.contextmanager
def _handling(handler: _Interrupts) -> Iterator[None]:
    """Take SIGINT where nobody else does: not from a program that handles it, nor in the background, where it is ignored."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before not in (signal.default_int_handler, leave):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_said = threading.Event()


def _say(name: str, error: KeyboardInterrupt) -> None:
    """Write the line once, from the first of several ranks."""
    if _said.is_set():
        return
    _said.set()
    if isinstance(error, Announced) or os.environ.get("RANK", "0") != "0":
        return
    what = " ".join(str(error).split())
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        sys.stderr.write(f"{name}: interrupted{'; ' if what else ''}{what}\n")
        sys.stderr.flush()


def end_children() -> None:
    """End the processes that multiprocessing started, and what those started."""
    children = multiprocessing.active_children()
    for pid in _with_descendants(child.pid for child in children if child.pid is not None):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 1
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()


def _with_descendants(pids: Iterable[int]) -> set[int]:
    """Add the processes that they started; only Linux tells."""
    parents = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            number, _, rest = file.read().partition(" ")
            parents[int(number)] = int(rest.rpartition(")")[2].split()[1])
    family = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def command_name(arguments: Sequence[str]) -> str:
    """Return ``ditfast``, with the command that its arguments begin with."""
    return " ".join(["ditfast", *(name for name in arguments[:1] if not name.startswith("-"))])


def _command() -> str | None:
    """Return the name, as in its other messages, of the command that this process was started as; None if it is none."""
    if not sys.argv or "--multiprocessing-fork" in sys.orig_argv:  # a command's child, which has its argv
        return None
    if sys.argv[0] == "-m":  # while Python looks for the module
        module = re.search(r" -m ?(ditfast(?:\.[\w.]+)?)(?: |$)", " ".join(sys.orig_argv))
        if module is None:
            return None
        folder, _, file = module[1].rpartition(".")
        program = f"benchmarks/{file}.py" if folder == "ditfast.benchmarks" else f"python -m {module[1]}"
    else:
        folder, file = os.path.split(os.path.realpath(sys.argv[0]))
        benchmarks = [os.path.realpath(os.path.join(PACKAGE, place, "benchmarks")) for place in ("", "..")]
        if folder not in benchmarks and file.removesuffix(".exe") != "ditfast":
            return None
        program = f"benchmarks/{file}" if folder in benchmarks else "python -m ditfast"
    if program == "python -m ditfast":
        return command_name(sys.argv[1:])
    return "ditfast bench" if program == "benchmarks/bench.py" else program


_NAME = _command()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _NAME:
    signal.signal(signal.SIGINT, leave)  # until ``run``, and behind it
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Python's end restores the default: death by a signal
