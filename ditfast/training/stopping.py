"""SIGTERM and Ctrl-C end a run behind the step it is in, with a checkpoint, as preemptible machines want it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..interrupt import Announced, end_at_once
from ..terminal import print_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Signals to this process so far."""

    def __init__(self) -> None:
        self.asked = False
        self.interrupts = 0  # presses of Ctrl-C

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def asked_to_stop(announce: Callable[[bool], str | None] = lambda last: None) -> Iterator[StopRequest]:
    """Note signals that ask this process to stop; a second Ctrl-C stops it at once.

    A second SIGTERM asks no more than the first: of a job whose every process gets one, a rank gets torchrun's too. Outside
    the main thread, where Python takes no signals, nobody asks.

    Args:
        announce: called at the first Ctrl-C with False, and with True at the second, after which ``Announced`` is raised; the
            line that it returns is written to stderr. Called in another thread, at once: Python's own handlers wait until a
            call into C++, such as a backward, returns.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: Any) -> None:
        request.asked = True
        if request.interrupts < 2:
            return
        interrupt = before[signal.SIGINT]
        signal.signal(signal.SIGINT, interrupt)
        try:
            (interrupt if callable(interrupt) else signal.default_int_handler)(number, frame)
        except KeyboardInterrupt:
            raise Announced from None

    def listen() -> None:
        while received := reader.recv(1):
            if received[0] != signal.SIGINT:
                continue
            request.asked = True
            request.interrupts += 1
            if request.interrupts > 2:
                end_at_once()
            line = announce(request.interrupts == 2)
            if line is not None:
                with suppress(OSError, ValueError):  # nobody reads any more
                    print_line(line)
            if request.interrupts == 2:
                _interrupt_main()  # whose handler may have run before this was counted
                reader.recv(1)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {name: signal.signal(name, on_signal) for name in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _runs.append(request)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield request
    finally:
        _runs.remove(request)
        signal.set_wakeup_fd(wakeup)
        writer.shutdown(socket.SHUT_WR)  # ends the thread behind what it has still to say; forked workers keep it open
        thread.join()
        writer.close()
        reader.close()
        for name in SIGNALS:
            signal.signal(name, before[name])


_runs: list[StopRequest] = []


def _keep_a_fork_silent() -> None:
    """In a forked process, such as a loader's worker: the same Ctrl-C reaches it, and its parent would count two."""
    if _runs:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_a_fork_silent)


def _interrupt_main() -> None:
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:  # this thread's signal would not end a call of the system that the main thread waits in
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
