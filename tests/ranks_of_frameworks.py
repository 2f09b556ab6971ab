"""The work of each of two processes in the tests of frameworks; apart, so that a process can import it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from framework_models import (
    CHANGE_BAR,
    FP32_BAR,
    Batch,
    assert_fast,
    assert_same_change,
    batches,
    call,
    change,
    loss_of,
    optimizer_of,
    pair,
    weights_of,
)
from support import error
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ditfast
from ditfast.sampling.ranks import Ranks

STEPS = 3
WHOLE = StateDictOptions(full_state_dict=True)


def share(batch: Batch, ranks: Ranks) -> Batch:
    """Return this rank's half of a batch."""
    return {name: value.chunk(ranks.world)[ranks.rank] for name, value in batch.items()}


def train_whole(kind: str, model: nn.Module, count: int = STEPS, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Train on whole batches, with each half's labels dropped by the same draws as on its rank."""
    optimizer = optimizer or optimizer_of(model)
    for step, batch in enumerate(batches(count, B=4)):
        for rank in range(2):
            (loss_of(kind, model, share(batch, Ranks(rank, 2, rank)), step) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def train_share(kind: str, model: nn.Module, ranks: Ranks, optimizer: torch.optim.Optimizer, count: int = STEPS) -> None:
    for step, batch in enumerate(batches(count, B=4)):
        loss_of(kind, model, share(batch, ranks), step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def predict_share(kind: str, model: nn.Module, ranks: Ranks) -> Tensor:
    """Return the output for this rank's images; FSDP2 shares out, so every rank calls."""
    with torch.no_grad():
        return call(kind, model.eval(), share(batches(1, B=4)[0], ranks))


# ------------------------------------------------------------------------------------------------ DistributedDataParallel
def ddp(ranks: Ranks, kind: str) -> None:
    fast, untouched = pair(kind)
    before = weights_of(untouched)
    wrapped = DistributedDataParallel(fast)
    train_share(kind, wrapped, ranks, optimizer_of(wrapped))
    assert_fast(kind, wrapped.module, steps=STEPS)
    train_whole(kind, untouched)
    assert_same_change(before, fast, untouched)
    found, expected = (predict_share(kind, model, ranks) for model in (wrapped, untouched))
    assert error(found, expected) <= FP32_BAR
    assert_fast(kind, wrapped.module, steps=STEPS, predictions=1)

    wrapped.train()
    untouched.train()
    with wrapped.no_sync():
        loss_of(kind, wrapped, share(batches(1, B=4)[0], ranks)).backward()
    loss_of(kind, wrapped, share(batches(2, B=4)[1], ranks)).backward()
    for batch in batches(2, B=4):
        for rank in range(2):
            (loss_of(kind, untouched, share(batch, Ranks(rank, 2, rank))) / 2).backward()
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (fast, untouched)]
    assert error(*gradients) <= CHANGE_BAR


# ------------------------------------------------------------------------------------------------ FSDP2
def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    """Shard a model by PyTorch's recipe: each block, then the model."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    official_tree = hasattr(model, "blocks")
    for block in model.blocks if official_tree else model.transformer_blocks:  # type: ignore[union-attr]
        # diffusers' own forward reads the first block's embedder at the end
        fully_shard(block, mesh=mesh, reshard_after_forward=official_tree, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def assert_blocks_fast(kind: str, model: nn.Module, calls: int) -> None:
    """Fail unless each sharded block of an accelerated model was fast in every call."""
    if kind == "DiT":
        assert isinstance(model, ditfast.DiT)
        return
    rows = [row for row in ditfast.acceleration_report(model).rows if row.module != "(model)"]
    assert [(row.fast_calls, row.original_calls) for row in rows] == [(calls, 0)] * 2


def fsdp(ranks: Ranks, kind: str) -> None:
    fast, untouched = pair(kind)
    before = weights_of(untouched)
    model = sharded(fast)
    optimizer = optimizer_of(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    train_share(kind, model, ranks, optimizer)
    train_whole(kind, untouched)
    found = get_model_state_dict(model, options=WHOLE)
    assert error(change(before, found), change(before, weights_of(untouched))) <= CHANGE_BAR
    assert_blocks_fast(kind, model, STEPS)
    assert error(predict_share(kind, model, ranks), predict_share(kind, untouched, ranks)) <= FP32_BAR
    assert_blocks_fast(kind, model, STEPS + 1)


def fsdp_bf16(ranks: Ranks, kind: str) -> None:
    """Mixed precision against the untouched model's, both against fp32."""
    fast, untouched = pair(kind)
    exact = copy.deepcopy(untouched)
    before = weights_of(exact)
    train_whole(kind, exact)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    errors = []
    for model in (fast, untouched):
        model = sharded(model, mp_policy=policy)
        train_share(kind, model, ranks, optimizer_of(model))
        after = get_model_state_dict(model, options=WHOLE)
        assert {value.dtype for value in after.values()} == {torch.float32}
        errors.append(error(change(before, after), change(before, weights_of(exact))))
    assert errors[0] <= 1.1 * errors[1] + 2.0**-8, errors
    assert_blocks_fast(kind, fast, STEPS)


# ------------------------------------------------------------------------------------------------ torch.distributed.checkpoint
def checkpoint(ranks: Ranks, kind: str, folder: Path) -> None:
    """Save a sharded run, and resume it sharded and on one process."""
    whole = pair(kind).fast
    train_whole(kind, whole, STEPS)
    model = sharded(pair(kind).fast)
    optimizer = optimizer_of(model)
    train_share(kind, model, ranks, optimizer)
    saved = get_model_state_dict(model, options=WHOLE)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)

    again = sharded(pair(kind, seed=1).fast)
    other = optimizer_of(again)
    blank = get_state_dict(again, other)
    loaded = {"model": blank[0], "optimizer": blank[1]}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(again, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert_equal(get_model_state_dict(again, options=WHOLE), saved)
    train_share(kind, again, ranks, other, 1)
    train_share(kind, model, ranks, optimizer, 1)
    assert_equal(get_model_state_dict(again, options=WHOLE), get_model_state_dict(model, options=WHOLE))
    assert get_optimizer_state_dict(again, other)["state"]

    for one in pair(kind, seed=2):
        state = {"model": get_model_state_dict(one)}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(one, state["model"])
        assert_equal(weights_of(one), saved)
        assert error(predict_share(kind, one, ranks), predict_share(kind, whole, ranks)) <= CHANGE_BAR


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
