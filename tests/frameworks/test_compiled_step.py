"""torch.compile of a whole training step: forward, loss, backward and optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from framework_models import (
    EACH_KIND,
    Batch,
    assert_fast,
    assert_same_change,
    assert_same_losses,
    assert_same_output,
    batches,
    loss_of,
    optimizer_of,
    pair,
    train,
    weights_of,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]


def step_of(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Batch], Tensor]:
    def step(batch: Batch) -> Tensor:
        loss = loss_of(kind, model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@EACH_KIND
def test_compiled_step_trains_alike(kind: str) -> None:
    fast, untouched = (model.eval() for model in pair(kind))  # a compiled graph draws other labels to drop
    before = weights_of(untouched)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(step_of(kind, fast, optimizer_of(fast)), backend=counter)
    found = [step(batch).item() for batch in batches(4)]
    assert counter.frame_count > 0
    compiled = counter.frame_count
    optimizer = optimizer_of(untouched)
    expected = train(kind, untouched, batches(4), optimizer)
    assert_same_losses(found, expected)
    assert_same_change(before, fast, untouched)
    step(batches(5)[-1])
    assert counter.frame_count == compiled, "compiled again"
    train(kind, untouched, batches(5)[-1:], optimizer)
    assert_same_output(kind, fast, untouched)
    assert_fast(kind, fast, predictions=1)
