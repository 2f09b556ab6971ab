"""FSDP2 by its recipe, ``fully_shard`` of each block and then of the model, in two processes."""

from __future__ import annotations

import pytest
import ranks_of_frameworks
from foreign import diffusers
from framework_models import EACH_KIND
from several_ranks import on_ranks

pytestmark = pytest.mark.full
WORK = {"fp32": ranks_of_frameworks.fsdp, "bf16": ranks_of_frameworks.fsdp_bf16}


@pytest.mark.parametrize("dtype", WORK)
@EACH_KIND
def test_sharded_blocks_train_like_one_process(kind: str, dtype: str) -> None:
    if kind == "diffusers":
        diffusers()
    on_ranks(2, WORK[dtype], kind)
