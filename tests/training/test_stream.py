"""Batches of each rank, from any step on, whatever the workers and the unreadable records."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterable
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ditfast.training.data import BadRecord, Batch, DataError, Digits, Record, Stream, open_data
from ditfast.training.order import batch_indices


class Numbers:
    """A record's values are its number; some cannot be read, and one ends the process that reads it."""

    input_shape = (1, 1, 1)
    num_classes = 3
    fingerprint = "numbers"

    def __init__(self, count: int = 10, bad: Iterable[int] = (), deadly: int | None = None):
        self.count, self.bad, self.deadly = count, set(bad), deadly

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if index in self.bad:
            raise BadRecord(f"numbers/{index}: no number")
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return Record(torch.full((1, 1, 1), float(index)), index % 3)

    def clean(self, values: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        return values


def taken(stream: Stream, steps: int) -> list[Batch]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(islice(stream, steps))


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        (a.step, a.indices) == (b.step, b.indices) and torch.equal(a.values, b.values) and torch.equal(a.labels, b.labels)
        for a, b in zip(found, expected, strict=True)
    )


def test_batches_hold_the_records_of_the_order() -> None:
    for step, batch in enumerate(taken(Stream(Numbers(), 0, 4), 6)):
        assert (batch.step, batch.indices) == (step, batch_indices(0, 10, 4, step))
        assert batch.values.flatten().tolist() == batch.indices
        assert batch.labels.tolist() == [index % 3 for index in batch.indices]
        assert (batch.values.shape, batch.labels.dtype) == ((4, 1, 1, 1), torch.int64)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int) -> None:
    data = Numbers(bad=[2, 3, 7])
    options = {"start_step": 2, "max_bad_records": 3}
    alone, several = Stream(data, 0, 4, **options), Stream(data, 0, 4, workers=workers, **options)  # type: ignore[arg-type]
    assert same(taken(several, 8), taken(alone, 8))
    assert several.bad == alone.bad


def test_a_stream_goes_on_in_the_middle_of_an_epoch() -> None:
    assert same(taken(Stream(Numbers(), 5, 4, start_step=3), 4), taken(Stream(Numbers(), 5, 4), 7)[3:])


def test_ranks_share_what_one_has_alone() -> None:
    parts = [taken(Stream(Numbers(), 0, 4, rank=rank, world=2), 3) for rank in range(2)]
    whole = taken(Stream(Numbers(), 0, 4), 3)
    assert [first.indices + second.indices for first, second in zip(*parts, strict=True)] == [batch.indices for batch in whole]


# ------------------------------------------------------------------------------------------------ unreadable records
def test_an_unreadable_record_is_named_once_and_its_neighbour_takes_its_place() -> None:
    stream = Stream(Numbers(bad=[9, 0, 4]), 0, 5, max_bad_records=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = list(islice(stream, 6))  # three epochs
    replaced = {9: 1, 0: 1, 4: 5}
    for step, batch in enumerate(batches):
        assert batch.indices == [replaced.get(index, index) for index in batch_indices(0, 10, 5, step)]
        assert batch.values.flatten().tolist() == batch.indices
    assert sorted(str(warning.message) for warning in caught) == [
        f"unreadable record, its neighbour takes its place: numbers/{index}: no number" for index in (0, 4, 9)
    ]
    assert sorted(stream.bad) == [0, 4, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_records_end_the_stream(workers: int) -> None:
    stream = Stream(Numbers(bad=[1, 3, 5, 7]), 0, 2, workers=workers, max_bad_records=3)
    with pytest.raises(
        DataError, match=r"^data: 4 unreadable records, more than the 3 allowed; the last: numbers/\d: no number$"
    ):
        taken(stream, 100)


def test_data_without_a_readable_record_is_refused() -> None:
    with pytest.raises(DataError, match="data: none of the records can be read"):
        taken(Stream(Numbers(3, bad=range(3)), 0, 2, max_bad_records=100), 1)


def test_a_killed_worker_is_named() -> None:
    with pytest.raises(DataError, match=r"^data: a process that reads records ended: DataLoader worker .*") as caught:
        taken(Stream(Numbers(deadly=6), 0, 5, workers=1), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("earlier_loader", [False, True], ids=["first-loader", "second-loader"])
def test_a_killed_worker_interrupts_only_the_wait_for_a_batch(earlier_loader: bool) -> None:
    """Its signal comes at any time: in a step, or in the handling of another error."""
    if earlier_loader:
        next(iter(DataLoader(range(4), num_workers=1)))  # installs torch's handler
    batches = iter(Stream(Numbers(), 0, 5, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    time.sleep(0.5)  # a signal's handler would raise here
    with pytest.raises(DataError, match=r"^data: a process that reads records ended: "):
        list(islice(batches, 10))  # what the worker had read already comes first


def test_fewer_records_than_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="data: 10 records, expected at least a batch, 11"):
        Stream(Numbers(), 0, 11)
    assert len(taken(Stream(Numbers(), 0, 10), 1)[0].indices) == 10


# ------------------------------------------------------------------------------------------------ digits
def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = open_data("digits")
    assert isinstance(data, Digits)
    assert (len(data), data.input_shape, data.num_classes) == (1797, (1, 8, 8), 10)
    batch = taken(Stream(data, 0, 16), 1)[0]
    assert batch.values.shape == (16, 1, 8, 8)
    assert -1 == batch.values.min() < batch.values.max() == 1
    flips, noise = torch.ones(16, dtype=torch.bool), torch.randn(16, 1, 8, 8)
    assert torch.equal(data.clean(batch.values, flips, noise), batch.values)
