"""Whole models on the engines that a device takes by default: their numbers, under autocast and compiled too."""

from __future__ import annotations

import foreign
import pytest
import support
import torch
from devices import CONFIG, Place, inputs, new_model
from support import DTYPES, assert_as_good_as, error
from test_whole_models import check_training_step

import ditfast
from ditfast import DiTConfig, reference
from ditfast.config import CONDITIONINGS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_output_and_gradients(conditioning: str, dtype: str, place: Place) -> None:
    config = DiTConfig(depth=2, hidden_size=144, num_heads=2, input_size=8, num_classes=7, conditioning=conditioning)
    check_training_step(config, 2, DTYPES[dtype], support.Runner("the default", "the default", place.device))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast(dtype: str, place: Place) -> None:
    model, (x, t, y) = new_model(place), inputs(place)
    oracle = reference.DiT(CONFIG).to(place.device).eval()
    oracle.load_state_dict(model.state_dict())
    with torch.no_grad():
        with torch.autocast(place.device.type, DTYPES[dtype]):
            found, eager = model(x, t, y), oracle(x, t, y)
        assert found.dtype == DTYPES[dtype]
        assert_as_good_as(found, oracle.double()(x.double(), t, y), eager)


def test_compiled_in_one_graph(place: Place) -> None:
    model, given = new_model(place), inputs(place)
    backend = "inductor" if place.device.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out = compiled(*given)
    found = torch.autograd.grad(out.square().sum(), model.blocks[0].mlp.fc1.weight)
    expected = model(*given)
    assert error(out, expected) < 1e-5
    assert error(found[0], *torch.autograd.grad(expected.square().sum(), model.blocks[0].mlp.fc1.weight)) < 1e-5


@pytest.mark.parametrize("kind", ["official", "diffusers"])
def test_accelerated_models_agree(kind: str, place: Place) -> None:
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    model = foreign.KINDS[kind].build().to(place.device)
    example = {name: value.to(place.device) for name, value in foreign.KINDS[kind].example(torch.float32).items()}
    with torch.no_grad():
        (before,) = foreign.run(model, example)
        (found,) = foreign.run(ditfast.accelerate(model), example)
        (after,) = foreign.run(ditfast.restore(model), example)
    assert error(found, before) < 1e-5
    assert torch.equal(after, before)


def has_flash_attn() -> bool:
    try:
        from flash_attn import flash_attn_qkvpacked_func
    except Exception:  # built for another torch or CUDA: anything may come out of it
        return False
    return callable(flash_attn_qkvpacked_func)


def test_attention_with_flash_attn_or_without(place: Place) -> None:
    qkv = torch.randn(2, 64, 3, 2, 72).to(place.device, torch.bfloat16)
    with ditfast.attention_engine("sdpa"):
        expected = ditfast.ops.attention(qkv)
    assert error(ditfast.ops.attention(qkv), expected) < 1e-2
    with ditfast.attention_engine("flash"):
        if place.device.type == "cuda" and has_flash_attn():
            assert error(ditfast.ops.attention(qkv), expected) < 1e-2
        else:
            with pytest.raises(RuntimeError, match="forced onto 'flash', but flash-attn"):
                ditfast.ops.attention(qkv)
