"""Where ranks meet: those of this start, and not those of an earlier one that ended.

torchrun's store outlives the ranks, so that ranks it has started anew would find the addresses of those that ended
(pytorch/pytorch#135712). What torchrun counts as restarts is no name for a start, as a node that joins later counts from 0.
"""

from __future__ import annotations

import datetime
import json
import secrets
import time

from torch import distributed
from torch.distributed import PrefixStore, Store

_PAUSE = 0.02  # seconds


def rendezvous(rank: int, world: int, patience: datetime.timedelta) -> Store:
    """A store for ``init_process_group``, at the place that the environment names.

    Args:
        rank: which of ``world`` this process is.
        world: number of ranks; all of them call this.
        patience: how long a rank waits for another.

    Raises:
        RuntimeError: the others are not there.
        ValueError: the environment does not say where.
    """
    store, _, _ = next(distributed.rendezvous("env://", rank, world, timeout=patience))
    return of_this_start(store, rank, world, patience)


def of_this_start(store: Store, rank: int, world: int, patience: datetime.timedelta) -> Store:
    """The part of a store that only the ranks of this start use.

    Each rank signs in with a name that is new. The first one publishes the names it finds, again and again; a rank that
    reads its own there knows that the first one is alive, and takes its name for the start's.

    The store is of all ranks, and holds whatever earlier ones wrote; the other arguments are those of ``rendezvous``.
    """
    name, until = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    store.set(f"name {rank}", name)
    while time.monotonic() < until:
        if rank == 0:
            store.set("start", json.dumps([store.get(f"name {k}").decode() for k in range(world)]))
            if store.check([f"{name} {k}" for k in range(1, world)]):
                return PrefixStore(name, store)
        else:
            names = json.loads(store.get("start"))
            if len(names) == world and names[rank] == name:
                store.set(f"{names[0]} {rank}", "")
                return PrefixStore(names[0], store)
        time.sleep(_PAUSE)
    raise RuntimeError(f"some of the {world} ranks are not there")
