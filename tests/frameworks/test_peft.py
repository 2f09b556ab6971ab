"""peft: LoRA adapters that train, save, merge and go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from framework_models import (
    EACH_KIND,
    assert_fast,
    assert_same_change,
    assert_same_losses,
    assert_same_output,
    assert_same_tensors,
    batches,
    pair,
    predict,
    train,
    weights_of,
)
from safetensors.torch import load_file
from support import error
from torch import nn

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]
TARGETS: dict[str, dict[str, Any]] = {  # by kind: names, a pattern, a module to train whole
    "DiT": {"target_modules": ["qkv", "attn.proj", "fc1"], "modules_to_save": ["final_layer.linear"]},
    "official": {"target_modules": r"blocks\.\d\.(attn\.(qkv|proj)|mlp\.fc\d)", "modules_to_save": ["final_layer.linear"]},
    "diffusers": {"target_modules": ["to_q", "to_v", "to_out.0"], "modules_to_save": ["proj_out_2"]},
}


def adapted(kind: str, model: nn.Module) -> Any:
    """Return a model with LoRA whose second matrices are not zero, as after some training."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": False, **TARGETS[kind]}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@EACH_KIND
def test_adapters_train_save_and_merge_like_the_untouched_model(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    base, types = copy.deepcopy(untouched), {type(module) for module in fast.modules()}
    found, expected = adapted(kind, fast), adapted(kind, untouched)
    before = weights_of(expected)
    assert_same_losses(train(kind, found, batches(3)), train(kind, expected, batches(3)))
    assert_same_change(before, found, expected)
    assert_fast(kind, fast, steps=3)

    assert_same_output(kind, found, expected)
    with found.disable_adapter():
        assert_same_output(kind, found, base)
    assert error(predict(kind, found), predict(kind, base)) > 1e-3
    assert_fast(kind, fast, steps=3, predictions=3)

    for name, model in (("found", found), ("expected", expected)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("found", "expected")]
    assert set(files[0]) == set(files[1])
    assert_same_tensors(files[0], peft.get_peft_model_state_dict(found))
    again = pair(kind)
    loaded = peft.PeftModel.from_pretrained(again.fast, tmp_path / "found")
    assert_same_output(kind, loaded, expected)
    assert_fast(kind, again.fast, predictions=1)

    merged, plain = found.merge_and_unload(), expected.merge_and_unload()
    assert merged is fast
    assert set(merged.state_dict()) == set(base.state_dict())
    assert {type(module) for module in merged.modules()} == types
    assert_same_output(kind, merged, plain)
    assert_fast(kind, merged, steps=3, predictions=4)
    assert_same_losses(train(kind, merged, batches(2)), train(kind, plain, batches(2)))
    assert_fast(kind, merged, steps=5, predictions=4)


@EACH_KIND
def test_unloaded_model_has_its_own_linears(kind: str) -> None:
    """Modules trained whole stay as trained; LoRA goes."""
    fast, untouched = pair(kind)
    types = {type(module) for module in fast.modules()}
    found, expected = adapted(kind, fast), adapted(kind, untouched)
    for model in (found, expected):
        train(kind, model, batches(1))
        model.merge_adapter()
    assert_same_output(kind, found, expected)
    with_adapters = predict(kind, found)
    found.unmerge_adapter()
    plain = found.unload()
    expected.unmerge_adapter()
    assert plain is fast
    assert {type(module) for module in plain.modules()} == types
    assert_same_output(kind, plain, expected.unload())
    assert error(predict(kind, plain), with_adapters) > 1e-3
    assert_fast(kind, fast, steps=1, predictions=4)


@EACH_KIND
def test_adapters_with_dropout_and_bf16(kind: str) -> None:
    fast, untouched = pair(kind)
    settings = {**TARGETS[kind], "lora_dropout": 0.2}
    found, expected = (peft.get_peft_model(seeded(model), peft.LoraConfig(r=4, **settings)) for model in (fast, untouched))
    assert_same_losses(train(kind, found, batches(2)), train(kind, expected, batches(2)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [train(kind, model, batches(2)) for model in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert_fast(kind, fast, steps=4)


def seeded(model: nn.Module) -> nn.Module:
    """Seed the adapter that is put on next."""
    torch.manual_seed(0)
    return model
