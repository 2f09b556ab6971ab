"""FSDP2's recipe with the fast DiT, against the reference under the same recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks_of_fully_shard as work
from ranks_of_fully_shard import Recipe
from several_ranks import on_ranks
from support import pairwise
from torch import distributed

from ditfast.config import CONDITIONINGS
from ditfast.sampling.ranks import Ranks

needs_gloo = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_gloo]

RECIPES = [
    Recipe(*case.values)
    for case in pairwise(
        conditioning=CONDITIONINGS,
        reshard=[None, True, False],
        precision=["none", "all", "blocks"],
        checkpointing=["none", "ditfast", "torch"],
        ends=[False, True],
    )
    if not case.marks
]


@pytest.fixture
def alone() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", ["none", "ditfast", "torch"])
def test_one_process_trains_as_the_reference(checkpointing: str, alone: None) -> None:
    work.trains_as_the_reference(Ranks(), Recipe(checkpointing=checkpointing))


def test_states_of_one_process(alone: None, tmp_path: Path) -> None:
    work.states_are_the_reference_s(Ranks(), tmp_path)


@pytest.mark.full
def test_two_processes_train_as_the_reference() -> None:
    on_ranks(2, work.every_recipe, RECIPES)


@pytest.mark.full
def test_states_of_two_processes(tmp_path: Path) -> None:
    on_ranks(2, work.states_are_the_reference_s, tmp_path)
