"""A rank's batches, from any step on."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ...checkpoints.errors import one_line
from ..order import batch_indices, rows
from .records import BadRecord, Data, DataError, Record

_WORKER_ENDED = "DataLoader worker"  # how torch begins to say so


class Batch(NamedTuple):
    """A rank's share of a step."""

    step: int  # from 0
    indices: list[int]  # of the records, b of them
    values: Tensor  # [b, ...] on the CPU, for Data.clean; pinned where there is a CUDA device
    labels: Tensor  # [b] int64


def _without_signals(start: Callable[[], Iterator[_Share]]) -> Iterator[_Share]:
    """The iterator that ``start`` makes, whose dead workers are reported by ``next`` alone.

    torch hears of them by SIGCHLD too, and raises its error wherever this process then is: in a step, or in the handling of
    the error that ``next`` has raised already. ``next`` asks every five seconds whether its workers live.
    """
    if threading.current_thread() is not threading.main_thread():  # where torch installs no handler
        return start()
    before = signal.getsignal(signal.SIGCHLD)
    shares = start()
    is_torchs = getattr(before, "__module__", None) == signal_handling.__name__
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None or is_torchs else before)
    return shares


@dataclass(eq=False, repr=False)
class Stream:
    """Batches of one step after the other, without end: the same ones whatever the number of workers.

    The place of an unreadable record is taken by the next readable one.

    Raises:
        DataError: fewer records than a batch; while iterating: too many unreadable records, or a worker was killed.
        ValueError: ``batch`` cannot be shared evenly.
    """

    data: Data
    seed: int  # of the order
    batch: int  # records of a step, over all ranks
    _: KW_ONLY
    rank: int = 0  # which of ``world`` gets these batches
    world: int = 1  # number of ranks; divides ``batch``
    start_step: int = 0
    workers: int = 0  # processes that read ahead; with 0 this one reads when it is asked
    max_bad_records: int = 0  # different ones that this rank may meet
    bad: dict[int, str] = field(default_factory=dict, init=False)  # what is wrong with each met so far, by its index

    def __post_init__(self) -> None:
        if len(self.data) < self.batch:
            raise DataError(f"data: {len(self.data)} records, expected at least a batch, {self.batch}")
        share = rows(self.batch, self.rank, self.world)
        self._shares = _Shares(self.data, self.seed, self.batch, share, self.max_bad_records)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._shares,
            batch_size=None,  # a share is read by one worker
            sampler=range(self.start_step, sys.maxsize),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )
        shares = _without_signals(lambda: iter(loader)) if self.workers else iter(loader)
        while True:
            try:
                share = next(shares)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if isinstance(error, RuntimeError) and not str(error).startswith(_WORKER_ENDED):
                    raise
                raise DataError(f"data: a process that reads records ended: {one_line(str(error))}") from error
            self._note(share.bad)
            if share.batch is None:
                raise DataError("data: none of the records can be read")
            yield share.batch

    def _note(self, found: dict[int, str]) -> None:
        for index, reason in found.items():
            if index in self.bad:
                continue
            self.bad[index] = reason
            if len(self.bad) > self.max_bad_records:
                counts = f"{len(self.bad)} unreadable records, more than the {self.max_bad_records} allowed"
                raise DataError(f"data: {counts}; the last: {reason}")
            warnings.warn(f"unreadable record, its neighbour takes its place: {reason}", stacklevel=3)


class _Share(NamedTuple):
    batch: Batch | None  # None where too many records are unreadable, or all
    bad: dict[int, str]


class _Shares(Dataset[_Share]):
    """A rank's share of each step; says what is unreadable in its result, as errors of other processes lose their form."""

    def __init__(self, data: Data, seed: int, batch: int, share: slice, max_bad_records: int):
        self.data, self.seed, self.batch, self.share = data, seed, batch, share
        self.max_bad_records = max_bad_records

    def __getitem__(self, step: int) -> _Share:
        indices = batch_indices(self.seed, len(self.data), self.batch, step)[self.share]
        bad: dict[int, str] = {}
        records: list[Record] = []
        for place, wanted in enumerate(indices):
            found = self._first_readable(wanted, bad)
            if found is None:
                return _Share(None, bad)
            indices[place], record = found
            records.append(record)
        values = torch.stack([record.values for record in records])
        labels = torch.tensor([record.label for record in records], device="cpu")
        return _Share(Batch(step, indices, values, labels), bad)

    def _first_readable(self, index: int, bad: dict[int, str]) -> tuple[int, Record] | None:
        """From ``index`` on; None where there is none, or ``bad`` has become too long to look further."""
        for later in range(len(self.data)):
            candidate = (index + later) % len(self.data)
            try:
                return candidate, self.data[candidate]
            except BadRecord as error:
                bad[candidate] = str(error)
            if len(bad) > self.max_bad_records:
                return None
        return None
