"""Writes that torch does not count: every one is noticed, in a number of forwards that the size of the weights tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from checkpoint_files import small
from foreign import official, official_inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ditfast
from ditfast import DiT
from ditfast.cpu import engine, packed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def native() -> engine.Engine:
    found, why = engine.found()
    if found is None:
        pytest.skip(why)
    return found


@pytest.fixture
def in_many_parts() -> Iterator[None]:
    before = packed.HASHED_AT_ONCE
    packed.HASHED_AT_ONCE = 1024
    yield
    packed.HASHED_AT_ONCE = before


def noticed_after(watch: packed.Watch, tensors: list[Tensor]) -> int:
    """Return how often ``unchanged`` was asked until it said no; 0 if it never did."""
    answers = (watch.unchanged(tensors) for _ in range(watch.questions))
    return next((asked for asked, unchanged in enumerate(answers, start=1) if not unchanged), 0)


@pytest.mark.filterwarnings("ignore:weights were written")
@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    at=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    at_once=st.sampled_from([64, 1000, 4096, 2**19]),
)
def test_one_bit_is_noticed_wherever_it_is(
    native: engine.Engine, sizes: list[int], dtype: torch.dtype, at: float, bit: int, at_once: int
) -> None:
    tensors = [torch.randint(-100, 100, (size,)).to(dtype) for size in sizes]
    before = packed.HASHED_AT_ONCE
    packed.HASHED_AT_ONCE = at_once
    try:
        watch = native.watch(tensors)
    finally:
        packed.HASHED_AT_ONCE = before
    assert watch.questions <= packed.MOST_QUESTIONS
    assert noticed_after(watch, tensors) == 0
    everything = [tensor.view(torch.uint8).numpy() for tensor in tensors]
    place = int(at * sum(map(len, everything)))
    for content in everything:
        if place < len(content):
            content[place] ^= 1 << bit
            break
        place -= len(content)
    assert noticed_after(watch, tensors) > 0


COLUMNS: dict[str, Callable[[Tensor], object]] = {
    "negated": lambda column: column.neg_(),
    "zero": lambda column: column.zero_(),
    "doubled": lambda column: column.mul_(2),
    "swapped": lambda column: column.copy_(column.flip(0)),
}


@pytest.mark.parametrize("change", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("stride", [32, 64, 256])
def test_a_column_whose_words_share_a_lane_is_noticed(
    change: Callable[[Tensor], object], stride: int, native: engine.Engine
) -> None:
    weight = torch.randn(64, stride)
    watch = native.watch([weight])
    change(weight.data[:, 9])
    assert noticed_after(watch, [weight]) == 1


@pytest.mark.usefixtures("in_many_parts")
def test_a_late_notice_warns_and_names_refresh(native: engine.Engine) -> None:
    weight = torch.randn(64, 64)
    watch = native.watch([weight])
    assert watch.questions == 16
    weight.numpy()[40, 7] = 3
    with pytest.warns(UserWarning, match=r"up to 16 forwards late: call ditfast\.refresh\(model\)"):
        assert noticed_after(watch, [weight]) > 1


def test_large_weights_are_looked_at_within_256_forwards(native: engine.Engine) -> None:
    weight = torch.zeros(300 * 2**20, dtype=torch.int8)
    watch = native.watch([weight])
    assert watch.questions == 256
    weight.numpy()[-70] = 1
    with pytest.warns(UserWarning, match="forwards late"):
        assert noticed_after(watch, [weight]) == 256


# ------------------------------------------------------------------------------------------------ refresh
def written_to(weight: Tensor) -> None:
    """In part, at a place that no few values from all over the tensor show."""
    weight.detach().numpy()[:, 9] = np.float32(2)


@pytest.mark.usefixtures("in_many_parts")
def test_refresh_of_a_dit() -> None:
    torch.manual_seed(0)
    model = DiT(small()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(1, *model.config.input_shape), torch.tensor([5]), torch.tensor([1])
    with torch.no_grad():
        model(*inputs)
        written_to(model.blocks[0].mlp.fc1.weight)
        ditfast.refresh(model)
        fresh = DiT(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(*inputs), fresh(*inputs))


@pytest.mark.usefixtures("in_many_parts")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own", "bf16"])
def test_refresh_of_an_accelerated_model(dtype: torch.dtype | None) -> None:
    model, fresh = official(), official()
    for one in (model, fresh):
        ditfast.accelerate(one, dtype=dtype)
    with torch.no_grad():
        run(model, official_inputs())
        written_to(model.blocks[0].mlp.fc1.weight)
        ditfast.refresh(nn.Sequential(model))  # a module that has it inside
        fresh.load_state_dict(model.state_dict())
        assert all(map(torch.equal, run(model, official_inputs()), run(fresh, official_inputs())))


def test_refresh_takes_modules_only() -> None:
    with pytest.raises(TypeError, match="model: got a dict, expected a module"):
        ditfast.refresh({})  # type: ignore[arg-type]
