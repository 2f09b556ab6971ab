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
    """Gives what says whether this process was asked; asked a second time, it stops at once.

    Outside the main thread, where Python takes no signals, nobody asks.
    """
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        asked.set()
        for name in SIGNALS:
            signal.signal(name, before[name])

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {name: signal.signal(name, on_signal) for name in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for name in SIGNALS:
            signal.signal(name, before[name])
