"""torch's AveragedModel around and beside a model that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from framework_models import (
    EACH_KIND,
    assert_fast,
    assert_same_change,
    assert_same_output,
    assert_same_tensors,
    batches,
    loss_of,
    optimizer_of,
    pair,
    weights_of,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]
AVERAGES = {"mean": {}, "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}}


def averaged(kind: str, model: nn.Module, options: dict[str, Any]) -> AveragedModel:
    average, optimizer = AveragedModel(model, use_buffers=True, **options), optimizer_of(model)
    for step, batch in enumerate(batches(3)):
        loss_of(kind, model, batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return average


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
@EACH_KIND
def test_average_is_that_of_the_untouched_model(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    before = weights_of(untouched)
    found, expected = averaged(kind, fast, options), averaged(kind, untouched, options)
    assert_same_change(before, found.module, expected.module)
    assert_same_change(before, fast, untouched)
    assert_same_output(kind, found, expected)
    assert_fast(kind, fast, steps=3)
    assert_fast(kind, found.module, predictions=1)
    torch.save(found.state_dict(), tmp_path / "average.pt")
    saved = torch.load(tmp_path / "average.pt", weights_only=True)
    assert saved.pop("n_averaged") == 3
    assert_same_tensors({name.removeprefix("module."): value for name, value in saved.items()}, found.module.state_dict())
    loaded = AveragedModel(pair(kind, seed=1).fast, use_buffers=True, **options)
    loaded.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    assert_same_output(kind, loaded, expected)
    assert_fast(kind, loaded.module, predictions=1)
