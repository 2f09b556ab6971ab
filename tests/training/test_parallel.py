"""Several processes under DDP and FSDP2 against one: gradients, norms, weights, and what happens when one dies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import ranks_of_training as work
import torch
from fake_cuda import fake_cuda
from several_ranks import on_ranks
from support import raises_naming
from torch import distributed, nn
from torch.multiprocessing import ProcessRaisedException

from ditfast.sampling.ranks import Ranks, RanksError
from ditfast.training import parallel
from ditfast.training.parallel import KINDS, accumulating, clip_gradients, distribute, full_tensors, gathered, joined, told

needs_gloo = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_gloo]

each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("case", work.CASES)
def test_gradients_are_those_of_one_process(kind: str, case: str) -> None:
    on_ranks(2, work.gradients_are_those_of_one_process, kind, case)


def test_a_rank_of_fsdp_holds_its_part_of_weights_and_gradients() -> None:
    on_ranks(3, work.a_rank_holds_its_part)


@each_kind
def test_ranks_begin_with_the_first_ones_weights(kind: str) -> None:
    on_ranks(2, work.ranks_begin_with_the_first_ones_weights, kind)


@each_kind
def test_frozen_weights_are_exported_as_they_were(kind: str, tmp_path: Path) -> None:
    on_ranks(2, work.frozen_weights_are_exported_as_they_were, kind, str(tmp_path / "run"))


@each_kind
def test_three_ranks_round_the_same_whenever_they_began(kind: str) -> None:
    on_ranks(3, work.later_ranks_sum_as_earlier_ones, kind)


def test_weights_are_loaded_into_parts() -> None:
    on_ranks(2, work.weights_are_loaded_into_parts)


@each_kind
def test_clipping_is_that_of_one_process(kind: str) -> None:
    on_ranks(2, work.gradients_are_clipped, kind, 1024.0)


@each_kind
def test_one_ranks_infinity_is_everybodys(kind: str) -> None:
    on_ranks(2, work.one_ranks_infinity_is_everybodys, kind)


def test_values_come_in_the_order_of_ranks() -> None:
    on_ranks(3, work.values_come_in_the_order_of_ranks)


@pytest.mark.parametrize("where", ["ddp", "fsdp", "told"])
def test_a_rank_that_dies_ends_the_others_with_a_line(where: str) -> None:
    with pytest.raises(ProcessRaisedException, match=r"RanksError: another rank ended; the same command goes on"):
        on_ranks(2, work.the_last_rank_dies, where)


# ------------------------------------------------------------------------------------------------ alone
def test_one_process_needs_nobody() -> None:
    model = nn.Linear(3, 2)
    with joined(Ranks(), torch.device("cpu")):
        assert not distributed.is_initialized()
        assert distribute(model, "fsdp", Ranks()) is model
        with accumulating(model, last=False):
            pass
        values = torch.arange(6).reshape(2, 3)
        assert gathered(values) is values
        assert told("x") == ["x"]
        assert full_tensors({"weight": model.weight}) == {"weight": model.weight}


def test_an_unknown_kind_is_refused() -> None:
    assert "ddp, fsdp" in raises_naming("parallel", lambda: distribute(nn.Linear(3, 2), "zero", Ranks()))


def stepped(*gradients: list[float]) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return torch.optim.AdamW([*parameters, nn.Parameter(torch.zeros(1))])  # one without a gradient


def left(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    return [parameter.grad.tolist() for parameter in optimizer.param_groups[0]["params"] if parameter.grad is not None]


@pytest.mark.parametrize(
    ("max_norm", "scale", "norm", "gradients"),
    [
        (None, 1.0, 5.0, [[3.0], [4.0, 0.0]]),
        (10.0, 1.0, 5.0, [[3.0], [4.0, 0.0]]),
        (2.5, 1.0, 5.0, [[1.5], [2.0, 0.0]]),
        (None, 4.0, 1.25, [[0.75], [1.0, 0.0]]),
        (0.625, 4.0, 1.25, [[0.375], [0.5, 0.0]]),
    ],
    ids=["no limit", "below it", "above it", "scaled", "scaled and above it"],
)
def test_clipping_by_hand(max_norm: float | None, scale: float, norm: float, gradients: list[list[float]]) -> None:
    optimizer = stepped([3.0], [4.0, 0.0])
    assert clip_gradients(optimizer, max_norm, scale) == norm
    assert left(optimizer) == gradients


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=["inf", "-inf", "nan"])
def test_an_infinite_gradient_scales_none(bad: float) -> None:
    optimizer = stepped([3.0], [bad, 1.0])
    assert not math.isfinite(clip_gradients(optimizer, 1.0))
    assert left(optimizer)[0] == [3.0]


def test_a_gpu_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where the ranks meet: the fake has no NCCL."""

    def meet_nobody(*arguments: object) -> None:
        raise RuntimeError("nobody is here")

    monkeypatch.setattr(parallel, "rendezvous", meet_nobody)
    with fake_cuda(count=2):
        torch.cuda.set_device(1)
        with pytest.raises(RanksError, match="nobody is here"), joined(Ranks(1, 2, 1), torch.device("cuda")):
            pass
        assert torch.cuda.current_device() == 1
