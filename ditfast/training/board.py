"""TensorBoard's scalars, each written when it is known.

Torch's and TensorBoard's own writers leave that to a thread, which a full disk ends with a traceback beside the run's one line.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """A file of events; scalars of steps after ``step``, which an earlier file may hold, no longer count.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._new_event = event_pb2.Event
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("ab"))
        self._write(step + 1, file_version="brain.Event:2")
        self._write(step + 1, session_log={"status": "START"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, summary={"value": [{"tag": tag, "simple_value": value} for tag, value in values.items()]})

    def close(self) -> None:
        self._records.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._new_event(wall_time=time.time(), step=step, **content)
        self._records.write(event.SerializeToString())
        self._records.flush()
