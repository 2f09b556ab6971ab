"""Ranks that meet in a store which still holds what earlier ones wrote."""

from __future__ import annotations

import datetime
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import distributed

from ditfast.sampling.rendezvous import of_this_start

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
PATIENCE = datetime.timedelta(seconds=60)


def met(store: distributed.Store, order: list[int]) -> dict[int, bytes]:
    """What each rank reads where the first one has written, with ranks starting in this order."""
    world = len(order)

    def rank_starts(rank: int) -> bytes:
        ours = of_this_start(store, rank, world, PATIENCE)
        if rank == 0:
            ours.set("address", os.urandom(8).hex())
        return ours.get("address")

    with ThreadPoolExecutor(world) as ranks:
        found = {rank: ranks.submit(rank_starts, rank) for rank in order}
        return {rank: future.result() for rank, future in found.items()}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=["first one first", "last one first"])
def test_each_start_has_keys_of_its_own(order: list[int]) -> None:
    store = distributed.HashStore()
    addresses = [set(met(store, order).values()) for _ in range(3)]
    assert [len(found) for found in addresses] == [1, 1, 1]
    assert len(set.union(*addresses)) == 3


@pytest.mark.parametrize("worlds", [(3, 2), (2, 3)], ids=str)
def test_another_number_of_ranks_meets_too(worlds: tuple[int, int]) -> None:
    store = distributed.HashStore()
    for world in worlds:
        assert len(set(met(store, list(reversed(range(world)))).values())) == 1


def test_a_rank_that_is_left_alone_says_so() -> None:
    store = distributed.HashStore()
    met(store, [0, 1])
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match="some of the 2 ranks are not there"):
            of_this_start(store, rank, 2, datetime.timedelta(seconds=0.2))
