"""safetensors' functions for models, whose files hold each storage once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from framework_models import EACH_KIND, assert_fast, assert_same_output, assert_same_tensors, batches, pair, train, weights_of
from safetensors.torch import load_file, load_model, save_file, save_model

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@EACH_KIND
def test_model_comes_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, untouched = (model.to(dtype) for model in pair(kind))
    path = str(tmp_path / "model.safetensors")
    save_model(model, path)
    assert_same_tensors(load_file(path), untouched.state_dict())
    for other in pair(kind, seed=1):
        other.to(dtype)
        assert load_model(other, path) == (set(), [])
        assert_same_tensors(other.state_dict(), untouched.state_dict())
    save_model(untouched, path)
    fast, other = pair(kind, seed=2)
    for each in (fast, other):
        load_model(each, path)  # of bf16 into fp32, too
    assert_same_output(kind, fast, other)
    assert_fast(kind, fast, predictions=1)


@EACH_KIND
def test_state_dict_of_a_trained_model(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    train(kind, fast, batches(2))
    path = tmp_path / "model.safetensors"
    save_file(fast.state_dict(), path)
    assert_same_tensors(load_file(path), weights_of(fast))
    untouched.load_state_dict(load_file(path), assign=True)
    assert_same_output(kind, fast, untouched)
    assert_fast(kind, fast, steps=2, predictions=1)
    train(kind, fast, batches(1))
    fast.load_state_dict(load_file(path), assign=True)
    assert_same_output(kind, fast, untouched)
    assert_fast(kind, fast, steps=3, predictions=2)
