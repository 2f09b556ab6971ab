"""Which part of a run this process does: one of several that torchrun started, or the only one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

PATIENCE = datetime.timedelta(days=30)  # the first rank to be done waits for the last


class RanksError(RuntimeError):
    """The other ranks are not there, or no longer."""


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1
    local: int = 0  # of the rank on its own machine

    @classmethod
    def from_environment(cls) -> Ranks:
        """Return what torchrun says, or a single rank where nothing is said.

        Raises:
            ValueError: a variable is no number, or is out of range.
        """
        world = _number("WORLD_SIZE", 1)
        rank = _number("RANK", 0)
        if rank >= world:
            raise ValueError(f"RANK: got '{rank}', expected a number below WORLD_SIZE={world}, as torchrun sets it")
        return cls(rank, world, _number("LOCAL_RANK", 0))

    @contextmanager
    def joined(self) -> Iterator[Callable[[], None]]:
        """Gives a barrier of all ranks, over gloo: no rank needs another's tensors.

        Raises:
            RanksError: the others are not there, or no longer.
        """
        if self.world == 1:
            yield lambda: None
            return
        from torch import distributed

        from .rendezvous import rendezvous

        def barrier() -> None:
            try:
                distributed.monitored_barrier(timeout=PATIENCE)
            except RuntimeError as error:
                raise RanksError(
                    "another rank ended before its images were there; the same command goes on from here"
                ) from error

        try:
            store = rendezvous(self.rank, self.world, distributed.default_pg_timeout)
            distributed.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world)
        except (RuntimeError, ValueError) as error:
            raise RanksError(f"rank {self.rank} of {self.world} does not find the others: {error}") from error
        try:
            yield barrier
        finally:
            distributed.destroy_process_group()


def _number(name: str, least: int) -> int:
    value = os.environ.get(name, str(least))
    if not (value.isascii() and value.isdecimal()) or int(value) < least:
        raise ValueError(f"{name}: got {value!r}, expected a number from {least}, as torchrun sets it")
    return int(value)
