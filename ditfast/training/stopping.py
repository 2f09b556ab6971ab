"""SIGTERM and Ctrl-C end a run behind the step it is in, with a checkpoint, as preemptible machines want it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives what says whether this process was asked; Ctrl-C stops it at once after that.

    A second SIGTERM asks no more than the first: of a job whose every process gets one, a rank gets torchrun's too. Outside
    the main thread, where Python takes no signals, nobody asks.
    """
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {name: signal.signal(name, on_signal) for name in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for name in SIGNALS:
            signal.signal(name, before[name])
