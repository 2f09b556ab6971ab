"""DistributedDataParallel in two processes."""

from __future__ import annotations

import pytest
import ranks_of_frameworks
from foreign import diffusers
from framework_models import EACH_KIND
from several_ranks import on_ranks

pytestmark = pytest.mark.full


@EACH_KIND
def test_two_processes_train_like_one(kind: str) -> None:
    if kind == "diffusers":
        diffusers()
    on_ranks(2, ranks_of_frameworks.ddp, kind)
