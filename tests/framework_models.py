"""Fast models and their untouched twins, trained side by side by the tests of frameworks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from foreign import diffusers_dit, official
from support import assert_as_good_as, error, randomize
from torch import Tensor, nn

import ditfast

Batch = dict[str, Tensor]
KINDS = ("DiT", "official", "diffusers")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
CHANNELS = 4
FP32_BAR = 1e-5  # relative, of outputs and gradients
CHANGE_BAR = 1e-4  # relative, of what a few steps change in the weights: each step starts from the errors of those before


class Pair(NamedTuple):
    """A fast model and one of the same weights that ditfast never touched, both in training mode."""

    fast: nn.Module
    untouched: nn.Module


def pair(kind: str, seed: int = 0) -> Pair:
    """Return models of depth 2 and width 64.

    Args:
        kind: ``"DiT"``: a ``ditfast.DiT`` and the reference; ``"official"`` and ``"diffusers"``: an accelerated copy and
            the model.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    if kind == "DiT":
        config = ditfast.DiTConfig(depth=2, hidden_size=64, num_heads=4, input_size=8, num_classes=10)
        untouched = randomize(ditfast.reference.DiT(config))
        fast: nn.Module = ditfast.DiT(config)
        fast.load_state_dict(untouched.state_dict())
    else:
        untouched = official(depth=2) if kind == "official" else diffusers_dit(num_layers=2)
        fast = ditfast.accelerate(copy.deepcopy(untouched))
    return Pair(fast.train(), untouched.train())


def batches(count: int, B: int = 2) -> list[Batch]:
    """Return batches of latents x, timesteps t, labels y and the noise that a model is to find in x."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(B, CHANNELS, 8, 8, generator=generator),
            "t": torch.randint(1000, (B,), generator=generator),
            "y": torch.randint(10, (B,), generator=generator),
            "noise": torch.randn(B, CHANNELS, 8, 8, generator=generator),
        }
        for _ in range(count)
    ]


def samples(count: int) -> list[Batch]:
    """Return a map-style dataset of single images."""
    return [{name: value[0] for name, value in batch.items()} for batch in batches(count, B=1)]


def call(kind: str, model: Callable[..., Any], batch: Batch) -> Tensor:
    """Return a model's output, called as the kind's users call it."""
    if kind == "diffusers":
        return model(batch["x"], timestep=batch["t"], class_labels=batch["y"]).sample
    return model(batch["x"], batch["t"], batch["y"])


def loss_of(kind: str, model: Callable[..., Any], batch: Batch, seed: int = 0) -> Tensor:
    """Return the mean squared error of the predicted noise; the seed is that of dropped labels."""
    torch.manual_seed(seed)
    return (call(kind, model, batch)[:, :CHANNELS] - batch["noise"]).square().mean()


def predict(kind: str, model: nn.Module, batch: Batch | None = None) -> Tensor:
    """Return a model's output in evaluation mode, without gradients; the mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        out = call(kind, model.eval(), batches(1)[0] if batch is None else batch)
    for module, training in modes:
        module.training = training
    return out


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return one whose steps are linear in the gradients, so that their errors stay small."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def train(kind: str, model: nn.Module, data: Iterable[Batch], optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Train in a plain loop; return the losses."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for step, batch in enumerate(data):
        loss = loss_of(kind, model, batch, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    assert set(before) == set(after)
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])


# ------------------------------------------------------------------------------------------------ comparisons
def assert_same_losses(found: Sequence[float], expected: Sequence[float]) -> None:
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=FP32_BAR)


def assert_same_change(before: Mapping[str, Tensor], found: nn.Module, expected: nn.Module) -> None:
    """Fail unless training changed the weights alike, and did change them."""
    true = change(before, weights_of(expected))
    assert true.norm() > 0
    assert error(change(before, weights_of(found)), true) <= CHANGE_BAR


def assert_change_as_good_as(before: Mapping[str, Tensor], found: nn.Module, exact: nn.Module, eager: nn.Module) -> None:
    """Fail if low-precision training changed the weights less like fp32 training than eager's did, by the budget of models."""
    changes = [change(before, weights_of(model)) for model in (found, exact, eager)]
    found_change, exact_change, eager_change = (tensor.bfloat16() for tensor in changes)
    assert_as_good_as(found_change, exact_change, eager_change)


def assert_same_output(kind: str, found: nn.Module, expected: nn.Module) -> None:
    """Fail unless two models of the same weights have the same output."""
    assert error(predict(kind, found), predict(kind, expected)) <= FP32_BAR


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless a file, or a state dict, has the keys, dtypes and bits that it should have."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def assert_fast(kind: str, model: nn.Module, steps: int = 0, predictions: int = 0) -> None:
    """Fail unless each block was fast in every call, and the whole model in every one without gradients.

    Args:
        kind: a ditfast.DiT has no report: it has no other forward, but a framework may have replaced it.
        model: the model itself, without wrappers.
        steps: calls with gradients so far.
        predictions: calls without.
    """
    if kind == "DiT":
        assert type(model).forward is ditfast.DiT.forward
        return
    rows = {row.module: row for row in ditfast.acceleration_report(model).rows}
    whole = rows.pop("(model)")
    assert (whole.fast_calls, whole.original_calls) == (predictions, steps)
    assert len(rows) == 2
    for row in rows.values():
        assert (row.fast_calls, row.original_calls) == (steps + predictions, 0), row
        assert row.swapped
