"""How kernels are simulated: checks, order of execution, what is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Options:
    threads: int = 1  # worker threads (CTAs are shared out between them)
    stats: bool = True  # count sectors, bank conflicts, ...
    check_init: bool = False  # report reads of uninitialised shared memory
    check_race: bool = False  # report shared-memory races (happens-before over bar.sync) and reads of in-flight cp.async data
    check_global: bool = False  # report plain global accesses of two CTAs that conflict (locks give false alarms)
    strict_views: bool = False  # bounds = extent of the tensor views, not of their storages
    cta_order: str = "forward"  # forward | reverse | random
    warp_order: str = "forward"  # forward | reverse | random
    cp_async: str = "late"  # late: data lands at wait_group;  early: at issue
    seed: int = 0
    max_instr: int = 1 << 34  # warp-instructions per warp before "endless loop"
    slice: int = 1 << 20  # warp-instructions before another warp gets a turn
    autotune: str = "first"  # first: the first config that compiles, none is run; counters: the least modelled time
    cta_begin: int = 0  # run only the CTAs [cta_begin, cta_end) of the grid (0,0 = all)
    cta_end: int = 0
    ptx_filter: Callable[[str, str], str] | None = None  # f(kernel name, ptx) -> ptx to run instead: mutation tests
    device_types: tuple[str, ...] = ("cpu",)  # of the tensors that may be passed; their memory has to be the CPU's
    around_launch: Callable[[Callable[[], None], Sequence[torch.Tensor]], None] | None = None  # f(launch, tensors) launches
    unsupported: str = "lazy"  # lazy: error when executed; eager: error at launch


options = Options()


def change_options(changes: dict[str, Any]) -> None:
    """Changes ``options`` for good; TypeError for names it does not have."""
    for name, value in changes.items():
        if not hasattr(options, name):
            raise TypeError(f"ptxsim: unknown option {name}")
        setattr(options, name, value)


@contextlib.contextmanager
def set_options(**changes: Any) -> Iterator[Options]:
    """Changes options inside the ``with`` block: ``with ptxsim.set_options(check_race=True): ...``"""
    before = {name: getattr(options, name) for name in changes}
    change_options(changes)
    try:
        yield options
    finally:
        change_options(before)
