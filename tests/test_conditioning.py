import copy
import math

import pytest
import torch
from support import raises_naming
from torch import nn

from ditfast.conditioning import pack_linears, packed_linear, timestep_embedding


def test_timestep_features_by_hand() -> None:
    t = torch.tensor([0.0, 7.25, 999.0])
    features = timestep_embedding(t)
    assert features.dtype == torch.float32
    for k in (0, 1, 127):
        angle = t.double() * math.exp(-math.log(10000) * k / 128)
        torch.testing.assert_close(features[:, k].double(), angle.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(features[:, 128 + k].double(), angle.sin(), rtol=0, atol=1e-4)


def test_diffusers_frequencies_reach_further() -> None:
    last = timestep_embedding(torch.tensor([999.0]), frequency_divisor=127)[0, 127]
    assert last.item() == pytest.approx(math.cos(999 / 10000), abs=1e-6)


def test_timestep_errors() -> None:
    assert "[B]" in raises_naming("t", lambda: timestep_embedding(torch.zeros(2, 1)))
    assert "even" in raises_naming("dim", lambda: timestep_embedding(torch.zeros(2), dim=7))


def linears(dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    return [nn.Linear(16, width).to(dtype) for width in (48, 48, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_packed_is_the_linears_one_by_one(dtype: torch.dtype, B: int) -> None:
    layers = linears(dtype)
    x = torch.randn(B, 16).to(dtype)
    with torch.no_grad():
        before = [layer(x) for layer in layers]
        pack_linears(layers)
        for out, expected in zip(packed_linear(x, layers), before, strict=True):
            torch.testing.assert_close(out, expected)
            assert out.stride(-1) == 1


def test_packing_moves_memory_only() -> None:
    layers = linears()
    parameters = [(layer.weight, layer.weight.clone()) for layer in layers]
    pack_linears(layers)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 1
    for layer, (parameter, values) in zip(layers, parameters, strict=True):
        assert layer.weight is parameter
        assert torch.equal(parameter, values)


@pytest.mark.parametrize("change", ["in place", "assigned", "deepcopied", "moved"])
def test_changed_weights_are_never_stale(change: str) -> None:
    layers = linears()
    pack_linears(layers)
    if change == "in place":
        nn.init.normal_(layers[1].weight)
    elif change == "assigned":
        layers[1].load_state_dict({"weight": torch.randn(48, 16), "bias": torch.randn(48)}, assign=True)
    elif change == "deepcopied":
        layers = copy.deepcopy(layers)
        nn.init.normal_(layers[2].weight)
    else:
        layers[0].weight.data = torch.randn(48, 16)
    x = torch.randn(3, 16)
    with torch.no_grad():
        for out, layer in zip(packed_linear(x, layers), layers, strict=True):
            torch.testing.assert_close(out, layer(x))


def test_gradients_reach_every_linear() -> None:
    layers = linears()
    pack_linears(layers)
    sum(out.sum() for out in packed_linear(torch.randn(3, 16), layers)).backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.any() for layer in layers)
