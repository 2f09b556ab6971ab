"""What each of several processes does in tests/training; apart, so that they can import it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from support import error, randomize
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import ditfast
from ditfast import DiTConfig, reference
from ditfast.sampling.ranks import Ranks
from ditfast.training import Digits, Trainer, TrainSettings
from ditfast.training.parallel import accumulating, clip_gradients, distribute, full_tensors, gathered, told

BATCH = 12


class Case(NamedTuple):
    conditioning: str = "adaln_zero"
    build: Callable[[DiTConfig], nn.Module] = ditfast.DiT
    checkpoint_activations: bool = False
    parts: int = 1  # of a rank's share, whose gradients are accumulated

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        sizes = dict(depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=9)
        model = randomize(self.build(DiTConfig(**sizes, conditioning=self.conditioning))).eval()  # type: ignore[arg-type]
        model.checkpoint_activations = self.checkpoint_activations  # type: ignore[assignment]
        return model


CASES = {
    "adaln_zero": Case(),
    "adaln": Case("adaln"),
    "cross_attention": Case("cross_attention"),
    "in_context": Case("in_context"),
    "checkpointed": Case(checkpoint_activations=True),
    "accumulated": Case(parts=2),
    "reference": Case(build=reference.DiT),
}


def inputs(step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of the batch of all ranks: 12 x [4, 8, 8], [12], [12]."""
    chance = torch.Generator().manual_seed(step)
    x, t = torch.randn(BATCH, 4, 8, 8, generator=chance), torch.rand(BATCH, generator=chance) * 999
    return x, t, torch.arange(BATCH) % 10


def backward(model: nn.Module, ranks: Ranks, parts: int = 1, step: int = 0) -> None:
    """Of the mean over the batch, this rank's share in so many parts."""
    shares = [tensor.chunk(ranks.world * parts)[parts * ranks.rank : parts * (ranks.rank + 1)] for tensor in inputs(step)]
    for k, share in enumerate(zip(*shares, strict=True)):
        with accumulating(model, last=k + 1 == parts):
            (model(*share).square().mean() / parts).backward()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """On the first rank; on the others nothing."""
    missing = [name for name, parameter in trained(model).items() if parameter.grad is None]
    assert not missing
    return full_tensors({name: parameter.grad for name, parameter in trained(model).items()})  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ sharing a model
def gradients_are_those_of_one_process(ranks: Ranks, kind: str, case: str) -> None:
    model = CASES[case].model()
    alone = copy.deepcopy(model)
    backward(alone, Ranks())
    expected = gradients(alone)
    backward(distribute(model, kind, ranks), ranks, CASES[case].parts)
    for name, gradient in gradients(model).items():
        assert error(gradient, expected[name]) <= 1e-5, name


def a_rank_holds_its_part(ranks: Ranks) -> None:
    model = CASES["adaln_zero"].model()
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    backward(distribute(model, "fsdp", ranks), ranks)
    for name, parameter in model.named_parameters():
        held = [parameter, parameter.grad] if parameter.requires_grad else [parameter]
        for tensor in held:
            assert isinstance(tensor, DTensor)
            assert sum(told(tensor.to_local().numel())) == whole[name]


def ranks_begin_with_the_first_ones_weights(ranks: Ranks, kind: str) -> None:
    model = CASES["adaln_zero"].model(seed=ranks.rank)
    distribute(model, kind, ranks)
    if kind == "ddp":
        found = dict(model.named_parameters())
    else:
        found = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    for name, parameter in CASES["adaln_zero"].model(seed=0).named_parameters():
        assert torch.equal(found[name], parameter), name


def later_ranks_sum_as_earlier_ones(ranks: Ranks, kind: str) -> None:
    """The first step of one that was made later with the weights of now, and the third step of one made before."""
    earlier = CASES["adaln_zero"].model()
    called = distribute(earlier, kind, ranks)
    for step in (0, 1):
        backward(called, ranks, step=step)
        earlier.zero_grad()
    later = CASES["adaln_zero"].model()
    backward(called, ranks, step=2)
    backward(distribute(later, kind, ranks), ranks, step=2)
    expected = gradients(earlier)
    for name, gradient in gradients(later).items():
        assert torch.equal(gradient, expected[name]), name


def weights_are_loaded_into_parts(ranks: Ranks) -> None:
    model, other = CASES["adaln_zero"].model(), CASES["adaln_zero"].model(seed=1)
    distribute(model, "fsdp", ranks)
    distribute(other, "fsdp", ranks)
    before = [parameter.to_local().data_ptr() for parameter in model.parameters()]
    with CommDebugMode() as talk:
        model.load_state_dict(other.state_dict())
    assert talk.get_total_counts() == 0
    assert [parameter.to_local().data_ptr() for parameter in model.parameters()] == before
    expected = full_tensors(dict(CASES["adaln_zero"].model(seed=1).named_parameters()))
    for name, whole in full_tensors(dict(model.named_parameters())).items():
        assert torch.equal(whole, expected[name]), name


def gradients_are_clipped(ranks: Ranks, kind: str, scale: float) -> None:
    model = CASES["adaln_zero"].model()
    alone = copy.deepcopy(model)
    backward(alone, Ranks())
    norm = torch.cat([parameter.grad.flatten() for parameter in trained(alone).values()]).double().norm().item()  # type: ignore[union-attr]
    expected = {name: gradient * 0.25 for name, gradient in gradients(alone).items()}
    backward(distribute(model, kind, ranks), ranks)
    for parameter in trained(model).values():
        parameter.grad *= scale
    optimizer = torch.optim.AdamW(trained(model).values())
    found = clip_gradients(optimizer, norm / 4, scale)
    assert len(set(told(found))) == 1
    assert abs(found / norm - 1) <= 1e-6
    for name, gradient in gradients(model).items():
        assert error(gradient, expected[name]) <= 1e-5, name


def one_ranks_infinity_is_everybodys(ranks: Ranks, kind: str) -> None:
    model = CASES["adaln_zero"].model()
    called = distribute(model, kind, ranks)
    x, t, y = (tensor.chunk(ranks.world)[ranks.rank] for tensor in inputs())
    called(x * (float("nan") if ranks.rank else 1), t, y).square().mean().backward()
    assert told(str(clip_gradients(torch.optim.AdamW(trained(model).values()), 1.0))) == ["nan"] * ranks.world


def values_come_in_the_order_of_ranks(ranks: Ranks) -> None:
    mine = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T + 10 * ranks.rank  # not contiguous
    assert gathered(mine).tolist() == [[1, 3, 11, 13, 21, 23], [2, 4, 12, 14, 22, 24]]
    assert told({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def frozen_weights_are_exported_as_they_were(ranks: Ranks, kind: str, out: str) -> None:
    model = CASES["adaln_zero"].model()
    model.get_submodule("blocks.0").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(k)), k % 9) for k in range(8)]
    trainer = Trainer(model, data, TrainSettings(steps=2, batch=4, rate=1e-2), out, ranks=ranks, parallel=kind)
    weights = trainer.run()
    average = full_tensors(trainer.averages.by_decay[0.9999])
    if ranks.rank == 0:
        for name, value in ditfast.load_checkpoint(weights).state_dict().items():
            assert torch.equal(value, average.get(name, before[name])), name
            assert (name in average) != torch.equal(value, before[name]), name


# ------------------------------------------------------------------------------------------------ a rank that dies
def the_last_rank_dies(ranks: Ranks, where: str) -> None:
    dies = ranks.rank == ranks.world - 1
    if where == "told":
        if dies:
            os._exit(0)
        told("hello")
    else:
        model = CASES["adaln_zero"].model()
        called = distribute(model, where, ranks)
        loss = called(*inputs()).square().mean()
        if dies:
            os._exit(0)
        loss.backward()


def train_and_stop(ranks: Ranks, out: str) -> None:
    """Train a tiny flow under FSDP for three steps, of which the last checkpoint is left, and nothing is exported."""
    settings = TrainSettings(3, batch=4, rate=1e-2, ema=(0.5,), loss="flow", path="gvp", flip=False)
    torch.manual_seed(0)
    config = DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=1, num_classes=10)
    trainer = Trainer(randomize(ditfast.DiT(config)), Digits(), settings, out, ranks=ranks, parallel="fsdp")
    trainer._export = lambda: trainer.out  # type: ignore[method-assign]  # as if it was stopped
    trainer.run()
    average = trainer.average()
    if average is not None:
        ditfast.save_checkpoint(average, f"{out}/expected.safetensors")
