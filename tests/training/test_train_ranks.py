"""Two ranks that skip steps alike: fp16's loss scale, and a record that only one of them reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from several_ranks import on_ranks
from torch import distributed
from train_processes import lines, scales_its_loss, skips_what_one_rank_reads

from ditfast.sampling.ranks import Ranks
from ditfast.training.parallel import KINDS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_is_all_ranks_and_goes_on_after_a_kill(kind: str, tmp_path: Path) -> None:
    on_ranks(2, scales_its_loss, kind, tmp_path / "two")
    scales_its_loss(Ranks(), kind, tmp_path / "one")
    logs = [lines(tmp_path / how / "whole") for how in ("two", "one")]
    for two, one in zip(*logs, strict=True):
        assert (two["norm"] is None) == (one["norm"] is None)
        assert two["loss"] == pytest.approx(one["loss"], rel=2**-8)
    assert [line.get("skipped") for line in logs[0]] == [1, 2, *[None] * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_rank_cannot_use_no_rank_takes(kind: str, tmp_path: Path) -> None:
    on_ranks(2, skips_what_one_rank_reads, kind, tmp_path / "run")
    assert [line.get("skipped") for line in lines(tmp_path / "run")] == [1, None, 2, None]
