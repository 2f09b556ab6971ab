"""Adapters on accelerated models, and parts replaced or changed before and after accelerate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign import KINDS, official, official_inputs, run
from support import error, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ditfast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
]


# ------------------------------------------------------------------------------------------------ adapters
class Lora(nn.Module):
    """As adapters do: the linear they adapt is called by them."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) if self.enabled else self.base(x)


ADAPTED = {
    "official": (
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"),
        *("blocks.1.attn.qkv", "final_layer.linear", "final_layer.adaLN_modulation.1", "t_embedder.mlp.0"),
    ),
    "diffusers": (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "proj_out_1", "proj_out_2"),
        *("transformer_blocks.1.attn1.to_v", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", "linear_2"),
    ),
}
CASES = [(kind, target) for kind, targets in ADAPTED.items() for target in targets]


def adapt(model: nn.Module, target: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(f".{target}"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrap(module))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "target"), CASES, ids=lambda value: value)
def test_adapters(kind: str, target: str, when: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    if when == "after":
        ditfast.accelerate(model)
    adapt(model, target, lambda linear: randomize(Lora(linear)).requires_grad_(True))
    if when == "before":
        ditfast.accelerate(model)
        assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
    adapters = [module for module in model.modules() if isinstance(module, Lora)]
    assert adapters
    trained = [weight for adapter in adapters for weight in (adapter.down.weight, adapter.up.weight)]

    def step() -> list[Tensor]:
        out = run(model, inputs)[0]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), trained)]

    with torch.no_grad():
        found = run(model, inputs)[0]
        for adapter in adapters:
            adapter.enabled = False
        disabled = run(model, inputs)[0]
        for adapter in adapters:
            adapter.enabled = True
    found_step = step()
    ditfast.restore(model)
    expected = step()
    assert error(found, expected[0]) <= 1e-5
    assert error(disabled, expected[0]) > 1e-4
    for one, other in zip(found_step, expected, strict=True):
        assert error(one, other) <= 1e-4


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrised_weights(norm: Callable[[nn.Module], nn.Module], when: str) -> None:
    model, inputs = official(), official_inputs()
    if when == "after":
        ditfast.accelerate(model)
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1", "blocks.2.adaLN_modulation.1", "final_layer.linear"):
        norm(model.get_submodule(name))
    ditfast.accelerate(model)
    assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
    oracle = ditfast.restore(copy.deepcopy(model)) if norm is not nn.utils.weight_norm else None
    for training in (False, True, True):
        found = run(model.train(training), inputs)[0]
        if oracle is None:
            assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5
            ditfast.accelerate(model)
        else:
            assert error(found, run(oracle.train(training), inputs)[0]) <= 1e-5
            for a, b in zip(model.buffers(), oracle.buffers(), strict=True):
                assert error(a, b) <= 1e-5, "the power iteration has to run as often"


# ------------------------------------------------------------------------------------------------ replaced and changed parts
def replace(name: str, build: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, randomize(build()))

    return change


def drop(model: nn.Module) -> None:
    model.blocks[1].attn.proj_drop.p = 0.5


def skip(model: nn.Module) -> None:
    del model.blocks[1]


def offload(model: nn.Module) -> None:
    """As hooks of HF's accelerate do it, on the instance."""
    for part in (model, model.blocks[1], model.blocks[0].attn.qkv, model.blocks[2].norm1):
        plain = part.forward
        part.forward = lambda *args, plain=plain, **kwargs: 1.5 * plain(*args, **kwargs)


def new_eps(model: nn.Module) -> None:
    model.blocks[1].norm1.eps = 0.5


def halve(name: str) -> Callable[[nn.Module], None]:
    """As patches that merge tokens do it: another class, whose forward calls the one before."""

    def change(model: nn.Module) -> None:
        part = model.get_submodule(name)

        def forward(self: nn.Module, *given: Any, **named: Any) -> Tensor:
            return super(kind, self).forward(*given, **named) / 2

        kind = type("Halved", (type(part),), {"forward": forward})
        part.__class__ = kind

    return change


CHANGES = {
    "class of the model": halve(""),
    "class of a block": halve("blocks.1"),
    "class of attention": halve("blocks.1.attn"),
    "class of a norm": halve("blocks.0.norm2"),
    "class of a linear": halve("blocks.2.mlp.fc1"),
    "activation": replace("blocks.1.mlp.act", nn.ReLU),
    "norm": replace("blocks.1.norm2", lambda: nn.LayerNorm(64)),
    "attention": replace("blocks.1.attn", lambda: nn.Linear(64, 64)),
    "mlp": replace("blocks.2.mlp", lambda: nn.Linear(64, 64)),
    "linear without bias": replace("blocks.0.attn.qkv", lambda: nn.Linear(64, 192, bias=False)),
    "adaLN": replace("blocks.0.adaLN_modulation", lambda: nn.Linear(64, 384)),
    "block": replace("blocks.2", lambda: nn.Bilinear(64, 64, 64)),
    "embedder": replace("t_embedder", lambda: nn.Embedding(1000, 64)),
    "final norm": replace("final_layer.norm_final", nn.Identity),
    "patches": replace("x_embedder.proj", lambda: nn.Conv2d(4, 64, 2, 2, bias=False)),
    "dropout": drop,
    "skipped block": skip,
    "offloading": offload,
    "epsilon": new_eps,
}


class PerToken(nn.Module):
    def __init__(self, bilinear: nn.Bilinear):
        super().__init__()
        self.bilinear = bilinear

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.bilinear(x, c[:, None].expand_as(x).contiguous())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["", "in bf16"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_accelerate(change: str, dtype: torch.dtype | None) -> None:
    model, inputs = official(), official_inputs()
    if change == "embedder":
        inputs["t"] = inputs["t"].long()
    ditfast.accelerate(model, dtype=dtype)
    with torch.no_grad():
        run(model, inputs)
        CHANGES[change](model)
        if change == "block":
            model.blocks[2] = PerToken(model.blocks[2])
        model.train(change == "dropout")
        found = run(model, inputs)[0]
        expected = run(ditfast.restore(model), inputs)[0]
        assert error(found, expected) <= (1e-5 if dtype is None else 3e-2)
        assert run(model.eval(), inputs)[0].dtype == found.dtype


def test_a_wrapper_that_stays_behind_restore() -> None:
    """Somebody wraps the swapped forward; restore cannot take that away, but what it wraps is the original again."""
    model, inputs = official(), official_inputs()
    with torch.no_grad():
        before = run(model, inputs)[0]
        ditfast.accelerate(model)
        swapped = model.forward
        model.forward = lambda **kwargs: swapped(**kwargs)
        assert error(run(model, inputs)[0], before) <= 1e-5
        assert "wrapped or replaced" in ditfast.acceleration_report(model).rows[0].engine
        with ditfast.accelerated(model):
            assert "forward was replaced before" in ditfast.acceleration_report(model).rows[0].reason
        assert torch.equal(run(ditfast.restore(model), inputs)[0], before)
        model.forward = swapped  # as offloading is removed
        assert torch.equal(run(model, inputs)[0], before)
        ditfast.accelerate(model, dtype=torch.bfloat16)
        assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
        assert vars(model)["forward"] is not swapped
        assert 1e-5 < error(run(model, inputs)[0], before) < 3e-2
