"""Hugging Face's Accelerate: its loop, mixed precision, files and unwrapping."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from framework_models import (
    EACH_KIND,
    assert_change_as_good_as,
    assert_fast,
    assert_same_change,
    assert_same_losses,
    assert_same_output,
    assert_same_tensors,
    loss_of,
    optimizer_of,
    pair,
    predict,
    samples,
    train,
    weights_of,
)
from safetensors.torch import load_file
from support import error
from torch import nn
from torch.utils.data import DataLoader

import ditfast

accelerate = pytest.importorskip("accelerate")

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread", "_own_state")]


@pytest.fixture
def _own_state() -> Iterator[None]:
    """Accelerate keeps its settings for the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Loop:
    """The training loop of Accelerate's guide, over batches of two."""

    def __init__(self, kind: str, model: nn.Module, **settings: Any):
        accelerate.state.AcceleratorState._reset_state()
        self.kind = kind
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
        optimizer = optimizer_of(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            model, optimizer, DataLoader(samples(12), batch_size=2), schedule
        )
        self.norms: list[float] = []

    def run(self, first: int = 0, stop: int | None = None) -> list[float]:
        losses = []
        for step, batch in enumerate(self.data):
            if step < first:
                continue
            if step == stop:
                break
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.kind, self.model, batch, step)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(self.accelerator.gather(loss).item())
        return losses


@EACH_KIND
def test_loop_accumulates_and_clips_alike(kind: str) -> None:
    fast, untouched = pair(kind)
    before = weights_of(untouched)
    found, expected = Loop(kind, fast), Loop(kind, untouched)
    assert_same_losses(found.run(), expected.run())
    assert len(found.norms) == 3
    assert_same_losses(found.norms, expected.norms)
    assert_same_change(before, fast, untouched)
    assert_fast(kind, found.accelerator.unwrap_model(found.model), steps=6)
    assert_same_output(kind, fast, untouched)


@EACH_KIND
def test_bf16_training_is_as_good_as_untouched(kind: str) -> None:
    fast, untouched = pair(kind)
    exact, before = copy.deepcopy(untouched), weights_of(untouched)
    Loop(kind, exact).run()
    found, expected = Loop(kind, fast, mixed_precision="bf16"), Loop(kind, untouched, mixed_precision="bf16")
    assert found.run() == pytest.approx(expected.run(), rel=1e-2)
    assert_change_as_good_as(before, fast, exact, untouched)
    assert {value.dtype for value in fast.state_dict().values()} == {torch.float32}
    assert predict(kind, found.model).dtype == predict(kind, expected.model).dtype == torch.float32
    assert_fast(kind, fast, steps=6, predictions=1)


@pytest.mark.parametrize("keep", [True, False], ids=["keep-wrapper", "drop-wrapper"])
@EACH_KIND
def test_unwrapped_model_stays_fast(kind: str, keep: bool) -> None:
    fast, untouched = pair(kind)
    found = Loop(kind, fast, mixed_precision="bf16")
    unwrapped = found.accelerator.unwrap_model(found.model, keep_fp32_wrapper=keep)
    assert unwrapped is fast
    assert error(predict(kind, unwrapped), predict(kind, untouched)) <= (2e-2 if keep else 1e-5)
    assert_fast(kind, unwrapped, predictions=1)
    if not keep:
        copied = copy.deepcopy(unwrapped)
        with torch.no_grad():
            for parameter in unwrapped.parameters():
                parameter.zero_()
        assert_same_output(kind, copied, untouched)
        assert_fast(kind, copied, predictions=1)
    if kind != "DiT":
        ditfast.restore(fast)
        fast.load_state_dict(untouched.state_dict())
        if not keep:
            assert torch.equal(predict(kind, fast), predict(kind, untouched))
            ditfast.accelerate(fast)
            assert_same_output(kind, fast, untouched)
            assert_fast(kind, fast, predictions=1)


@EACH_KIND
def test_save_model_writes_every_weight(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    loop = Loop(kind, fast)
    loop.accelerator.save_model(loop.model, tmp_path)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), untouched.state_dict())
    empty = pair(kind, seed=1)
    for model in empty:
        accelerate.load_checkpoint_in_model(model, str(tmp_path), strict=True)
        assert_same_output(kind, model, untouched)
    assert_fast(kind, empty.fast, predictions=1)


@EACH_KIND
def test_resumed_run_has_the_bits_of_the_whole_run(kind: str, tmp_path: Path) -> None:
    whole, _ = pair(kind)
    expected = Loop(kind, whole).run()
    first = Loop(kind, pair(kind).fast)
    found = first.run(stop=4)
    first.accelerator.save_state(str(tmp_path))
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), weights_of(first.model))
    resumed, untouched = pair(kind, seed=1)
    second = Loop(kind, resumed)
    second.accelerator.load_state(str(tmp_path))
    assert found + second.run(first=4) == expected
    assert_same_tensors(weights_of(resumed), weights_of(whole))
    assert_fast(kind, resumed, steps=2)
    other = Loop(kind, untouched)
    other.accelerator.load_state(str(tmp_path))
    assert_same_losses(found + other.run(first=4), expected)


@EACH_KIND
def test_prepared_before_it_is_accelerated(kind: str) -> None:
    fast, untouched = pair(kind)
    if kind == "DiT":
        pytest.skip("nothing to accelerate")
    ditfast.restore(fast)
    found = Loop(kind, fast)
    ditfast.accelerate(found.model)
    assert_same_losses(found.run(), Loop(kind, untouched).run())
    assert_fast(kind, fast, steps=6)


@EACH_KIND
def test_untouched_loop_is_a_plain_loop(kind: str) -> None:
    """Guard the comparison itself: Accelerate trains the fast model like a loop without Accelerate."""
    fast, untouched = pair(kind)
    before = weights_of(untouched)
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, data = accelerator.prepare(fast, optimizer_of(fast), DataLoader(samples(4), batch_size=2))
    for step, batch in enumerate(data):
        accelerator.backward(loss_of(kind, model, batch, step))
        optimizer.step()
        optimizer.zero_grad()
    train(kind, untouched, DataLoader(samples(4), batch_size=2))
    assert_same_change(before, fast, untouched)
