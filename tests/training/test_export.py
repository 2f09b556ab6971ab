"""Models that a run could not export are refused before its first step; frozen and tied weights are exported as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import randomize
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import ditfast
from ditfast import DiT, DiTConfig, reference
from ditfast.training import Digits, RunError, Trainer, TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=1, num_classes=10)
SETTINGS = TrainSettings(steps=3, batch=8, rate=1e-2, ema=(0.5,))


def tiny(kind: type[nn.Module] = DiT) -> nn.Module:
    torch.manual_seed(0)
    return randomize(kind(CONFIG))


def parametrized(model: DiT) -> nn.Module:
    parametrizations.weight_norm(model.blocks[0].attn.qkv)
    return model


def with_lora(model: DiT) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]))


def with_injected_lora(model: DiT) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc1"]), model)


def with_head(model: DiT) -> nn.Module:
    model.head = nn.Linear(32, 5)
    return model


def with_old_weight_norm(model: DiT) -> nn.Module:
    weight_norm(model.final_layer.linear)
    return model


def pruned(model: DiT) -> nn.Module:
    prune.random_unstructured(model.blocks[1].mlp.fc2, "weight", amount=0.5)
    return model


def wider(model: DiT) -> nn.Module:
    model.blocks[1].mlp.fc1 = nn.Linear(32, 256)
    return model


def with_other_layer(model: DiT) -> nn.Module:
    class GatedMlp(nn.Module):
        def __init__(self, mlp: nn.Module):
            super().__init__()
            self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    model.blocks[1].mlp = GatedMlp(model.blocks[1].mlp)
    return model


def with_other_activation(model: DiT) -> nn.Module:
    model.blocks[0].adaLN_modulation[0] = nn.GELU()
    return model


def without_a_bias(model: DiT) -> nn.Module:
    model.blocks[0].mlp.fc2 = nn.Linear(128, 32, bias=False)
    return model


REFUSED: list[tuple[Callable[[DiT], nn.Module], str]] = [
    (parametrized, r"blocks\.0\.attn\.qkv\.parametrizations\.weight\.original0, .*remove_parametrizations"),
    (with_lora, r"base_model\.model\.pos_embed, .* and \d+ more, .*merge_and_unload"),
    (with_injected_lora, r"blocks\.0\.mlp\.fc1\.base_layer\.weight, .*lora_A.*merge_and_unload"),
    (with_head, r"head\.weight, head\.bias, which the exported DiT has no place for: remove"),
    (with_old_weight_norm, r"final_layer\.linear\.weight_g, .*remove_weight_norm"),
    (pruned, r"blocks\.1\.mlp\.fc2\.weight_orig, .*prune\.remove"),
    (torch.compile, r"_orig_mod\.pos_embed, .*TrainSettings\(compile=True\)"),
    (wider, r"blocks\.1\.mlp\.fc1\.weight of shape \(256, 32\), expected \(128, 32\)"),
    (without_a_bias, r"one without blocks\.0\.mlp\.fc2\.bias"),
    (with_other_layer, r"a GatedMlp as blocks\.1\.mlp, expected a Mlp"),
    (with_other_activation, r"a GELU as blocks\.0\.adaLN_modulation\.0, expected a SiLU"),
    (lambda model: model.requires_grad_(False), "one whose parameters are all frozen"),
    (lambda model: model.bfloat16(), r"pos_embed of torch\.bfloat16, expected float32 weights: model\.float\(\)"),
]
NAMES = [
    *("parametrized", "LoRA", "injected LoRA", "head", "weight norm", "pruned", "compiled"),
    *("wider", "no bias", "layer", "activation", "frozen", "bf16"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, of the old weight_norm
@pytest.mark.parametrize(("change", "message"), REFUSED, ids=NAMES)
def test_what_could_not_be_exported_is_refused_before_the_first_step(
    change: Callable[[DiT], nn.Module], message: str, tmp_path: Path
) -> None:
    model = change(tiny())  # type: ignore[arg-type]
    with pytest.raises(RunError, match=f"^model: got {message}") as caught:
        Trainer(model, Digits(), SETTINGS, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


class Custom(nn.Module):
    """A model of one's own, with the names of a DiT."""

    unpatchify = reference.DiT.unpatchify

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        inner = reference.DiT(config)
        self.register_buffer("pos_embed", inner.pos_embed.detach())
        for name, child in inner.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return reference.DiT.forward(self, x, t, y)  # type: ignore[arg-type]


class Own(nn.Module):
    """A model with a config that is none of ours."""

    def __init__(self, config: object):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), "a Linear, expected a ditfast.DiT or a ditfast.reference.DiT; ditfast.load_checkpoint"),
        (Own({"depth": 2}), "an? Own whose config is a dict, expected a ditfast.DiT"),
        (nn.DataParallel(DiT(CONFIG)), r"a DataParallel, expected .*: give the model that it wraps, model\.module"),
    ],
    ids=["no config", "another config", "DataParallel"],
)
def test_a_model_without_a_config_of_ours_is_refused(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"^model: got {message}"):
        Trainer(model, Digits(), SETTINGS, tmp_path / "run")


def exported(model: nn.Module, out: Path) -> tuple[Trainer, dict[str, Tensor]]:
    trainer = Trainer(model, Digits(), SETTINGS, out)
    return trainer, ditfast.load_checkpoint(trainer.run()).state_dict()


@pytest.mark.parametrize("kind", [DiT, reference.DiT], ids=["fast", "reference"])
def test_what_is_frozen_is_exported_as_it_was(kind: type[nn.Module], tmp_path: Path) -> None:
    model = tiny(kind)
    model.get_submodule("blocks.0").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer, found = exported(model, tmp_path / "run")
    average = trainer.averages.by_decay[0.5]
    for name, value in found.items():
        is_frozen = name.startswith("blocks.0.") or name == "pos_embed"
        assert torch.equal(value, before[name] if is_frozen else average[name]), name
        assert is_frozen == (name not in average)
        assert is_frozen == torch.equal(model.state_dict()[name], before[name])


def test_tied_weights_are_exported_under_every_name(tmp_path: Path) -> None:
    model = tiny()
    model.get_submodule("blocks.1.mlp").fc1.weight = model.get_submodule("blocks.0.mlp").fc1.weight
    trainer, found = exported(model, tmp_path / "run")
    average = trainer.averages.by_decay[0.5]["blocks.0.mlp.fc1.weight"]
    assert torch.equal(found["blocks.0.mlp.fc1.weight"], average)
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], average)


def test_positions_of_its_own_are_exported(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.pos_embed.mul_(0.5)
    before = model.pos_embed.detach().clone()
    assert torch.equal(exported(model, tmp_path / "run")[1]["pos_embed"], before)


def test_a_subclass_with_plain_layers_is_a_dit(tmp_path: Path) -> None:
    class Logged(DiT):
        pass

    trainer, found = exported(tiny(Logged), tmp_path / "run")
    assert found.keys() == trainer.model.state_dict().keys()


def test_a_model_of_ones_own_trains_and_exports(tmp_path: Path) -> None:
    model = tiny(Custom)
    trainer, found = exported(model, tmp_path / "run")
    oracle, expected = exported(tiny(reference.DiT), tmp_path / "oracle")
    assert trainer.config == oracle.config
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_adapters_that_were_merged_train_and_export(tmp_path: Path) -> None:
    merged = with_lora(tiny()).merge_and_unload()  # type: ignore[arg-type]
    merged.requires_grad_(True)
    assert exported(merged, tmp_path / "run")[1]


def test_a_layer_added_during_the_run_is_named(tmp_path: Path) -> None:
    model = tiny()
    trainer = Trainer(model, Digits(), dataclasses.replace(SETTINGS, steps=1), tmp_path / "run")
    with_head(model)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"^model: got head\.weight, head\.bias"):
        trainer.average()
