"""torch.distributed.checkpoint: of one process, and of two that shard their model."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_of_frameworks
import torch.distributed.checkpoint as dcp
from foreign import diffusers
from framework_models import EACH_KIND, assert_fast, assert_same_output, assert_same_tensors, batches, pair, train
from several_ranks import on_ranks
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

pytestmark = [
    pytest.mark.full,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@EACH_KIND
def test_one_process_saves_and_loads(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    for model in (fast, untouched):
        train(kind, model, batches(2))
    dcp.save({"model": get_model_state_dict(fast)}, checkpoint_id=tmp_path)
    for model in pair(kind, seed=1):
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=tmp_path)
        set_model_state_dict(model, state["model"])
        assert_same_tensors(model.state_dict(), fast.state_dict())
        assert_same_output(kind, model, untouched)
    assert_fast(kind, fast, steps=2)


@EACH_KIND
def test_sharded_run_resumes_sharded_or_whole(kind: str, tmp_path: Path) -> None:
    if kind == "diffusers":
        diffusers()
    on_ranks(2, ranks_of_frameworks.checkpoint, kind, tmp_path)
