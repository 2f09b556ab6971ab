"""Runs a function in several processes that talk to each other over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from ditfast.sampling.ranks import Ranks
from ditfast.training.parallel import joined

CPU = torch.device("cpu")


def on_ranks(world: int, work: Callable[..., None], *args: Any) -> None:
    """Calls ``work(ranks, *args)`` on each rank; what one raises, this raises.

    Args:
        world: number of processes.
        work: a function that they can import.
        args: that can be pickled.
    """
    # Each process begins with these imported; torch._dynamo is what DDP and FSDP2 import when first used.
    multiprocessing.set_forkserver_preload(["ditfast.training.checkpoints", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (world, port, work, args), nprocs=world, start_method="forkserver")


def _rank(rank: int, world: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks = Ranks(rank, world, rank)
    with joined(ranks, CPU):
        work(ranks, *args)
