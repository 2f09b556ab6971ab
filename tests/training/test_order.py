"""Which records a step sees."""

import pytest

from ditfast.training.order import batch_indices, rows


def seen(count: int, batch: int, steps: int, seed: int = 0) -> list[int]:
    return [index for step in range(steps) for index in batch_indices(seed, count, batch, step)]


@pytest.mark.parametrize("batch", [1, 4, 7, 10])
def test_an_epoch_has_each_record_once_wherever_batches_end(batch: int) -> None:
    indices = seen(10, batch, steps=-(-30 // batch))
    epochs = [indices[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_does_not_depend_on_how_it_is_cut_into_batches() -> None:
    assert seen(10, 4, steps=15) == seen(10, 10, steps=6) == seen(10, 1, steps=60)


def test_another_seed_is_another_order() -> None:
    assert seen(100, 100, steps=1, seed=0) != seen(100, 100, steps=1, seed=1)


def test_the_order_is_the_same_for_ever() -> None:
    assert batch_indices(seed=3, count=12, batch=8, step=1) == [9, 8, 4, 3, 10, 5, 8, 9]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_a_batch(world: int) -> None:
    parts = [list(range(6))[rows(6, rank, world)] for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(6))
    assert {len(part) for part in parts} == {6 // world}


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: got 6, expected a multiple of the 4 ranks"):
        rows(6, 0, 4)
