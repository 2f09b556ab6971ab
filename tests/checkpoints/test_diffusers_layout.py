"""Weights of diffusers' own class, loaded here; ours, loaded there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SMALL, inputs, same_weights, small, weights_of
from support import error, randomize

import ditfast
from ditfast import CheckpointError, DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.checkpoints.layouts import to_diffusers
from ditfast.config import FLAVOURS, Flavour

diffusers = pytest.importorskip("diffusers")

Theirs = Any
PLAIN_LOAD = {"low_cpu_mem_usage": False}  # True, the default, warns where the package named accelerate is missing


def their_model(**fields: object) -> Theirs:
    config = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10}
    model = randomize(diffusers.DiTTransformer2DModel(**{**config, "out_channels": 8, **fields})).eval()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@torch.no_grad()
def outputs(ours: DiT, theirs: Theirs) -> tuple[torch.Tensor, torch.Tensor]:
    x, t, y = inputs(ours.config, next(ours.parameters()).dtype)
    return ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-6, 1e-1])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_outputs_are_diffusers_own(safe: bool, norm_eps: float, tmp_path: Path) -> None:
    theirs = their_model(norm_eps=norm_eps)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours = load_checkpoint(tmp_path)
    assert ours.config.arithmetic == Flavour(127, norm_eps, None)
    assert error(*outputs(ours, theirs)) < 1e-5
    official = DiT(small(flavour="official" if norm_eps < 1e-2 else "diffusers")).eval()
    official.load_state_dict(ours.state_dict())
    assert error(*outputs(official, theirs)) > 1e-4, "this test could not tell the flavours apart"


@pytest.mark.parametrize("out_channels", [None, 4, 8])
def test_variances(out_channels: int | None, tmp_path: Path) -> None:
    theirs = their_model(out_channels=out_channels)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert ours.config.learn_sigma == (out_channels == 8)
    assert error(*outputs(ours, theirs)) < 1e-5


def test_shards_pipelines_files_and_state_dicts(tmp_path: Path) -> None:
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole = load_checkpoint(tmp_path / "whole")
    for place in ("shards", "pipeline", "whole/diffusion_pytorch_model.safetensors"):
        found = load_checkpoint(tmp_path / place)
        assert same_weights(found.state_dict(), whole.state_dict()), place
        assert found.config == whole.config
    found = load_checkpoint(theirs.state_dict(), config=small(flavour="diffusers"))
    assert same_weights(found.state_dict(), whole.state_dict())
    assert found.source is not None
    assert found.source.layout == "diffusers"


def test_a_missing_shard(tmp_path: Path) -> None:
    their_model().save_pretrained(tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name}: No such file"):
        load_checkpoint(tmp_path)


def test_the_latent_size_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match="input_size: unknown, as diffusers' layout stores no positions"):
        load_checkpoint(their_model().state_dict())


def test_config_is_checked_against_theirs(tmp_path: Path) -> None:
    their_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="config: got input_size 16 where the checkpoint says 8, num_heads 2 where"):
        load_checkpoint(tmp_path, config=small(input_size=16, num_heads=2))
    assert load_checkpoint(tmp_path, config=small(flavour="official")).config.flavour == "official"


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"norm_type": "ada_norm"}, "norm_type: got 'ada_norm', expected 'ada_norm_zero'"),
        ({"activation_fn": "gelu"}, "activation_fn: got 'gelu', expected 'gelu-approximate'"),
        ({"out_channels": 5}, "out_channels: got 5, expected in_channels=4 or twice as many"),
        ({"norm_eps": -1}, "flavour.mlp_norm_eps: got -1, expected a positive number"),
        ({"num_attention_heads": None}, "num_attention_heads: got None, expected a positive integer"),
        ({"sample_size": [8, 16]}, r"sample_size: got \[8, 16\], expected a positive integer"),
        ({"num_layers": 3}, r"missing transformer_blocks\.2\."),
        ({"num_attention_heads": 5}, "misshapen pos_embed.proj.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_json_of_something_else(changed: dict[str, object], fault: str, tmp_path: Path) -> None:
    their_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(CheckpointError, match=fault):
        load_checkpoint(tmp_path)


def test_a_config_json_behind_a_byte_order_mark(tmp_path: Path) -> None:
    their_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    expected = load_checkpoint(tmp_path).config
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_checkpoint(tmp_path).config == expected


@pytest.mark.parametrize(("value", "apart"), [(0.25, "0.25"), (-0.0, "0")], ids=["by-a-quarter", "by-the-sign-of-zero"])
def test_copies_of_the_embedders_that_differ(value: float, apart: str, tmp_path: Path) -> None:
    theirs = their_model(num_layers=3)
    with torch.no_grad():
        for block in theirs.transformer_blocks:
            block.norm1.emb.timestep_embedder.linear_2.bias[3] = 0.0
        block.norm1.emb.timestep_embedder.linear_2.bias[3] = value
    theirs.save_pretrained(tmp_path)
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"
    with pytest.raises(CheckpointError, match=rf"1 of 10 copies .* the same bits in every block: {name} \(by up to {apart}\)$"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------ and back
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_round_trip_is_exact(num_classes: int, ending: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = small(num_classes=num_classes)
    state = weights_of(config, dtype)
    save_checkpoint(load_checkpoint(state, config=config), tmp_path / "theirs", layout="diffusers")
    save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / f"back.{ending}")
    back = load_checkpoint(tmp_path / f"back.{ending}", config=config)
    assert back.config == config
    assert same_weights(back.state_dict(), state)


def test_round_trip_of_theirs(tmp_path: Path) -> None:
    theirs = their_model(norm_eps=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / "ours.safetensors")
    save_checkpoint(load_checkpoint(tmp_path / "ours.safetensors"), tmp_path / "back", layout="diffusers")
    back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back", **PLAIN_LOAD)
    assert same_weights(back.state_dict(), theirs.state_dict())
    assert back.config.norm_eps == 1e-6


@pytest.mark.parametrize("flavour", ["official", "diffusers", Flavour(100, 1e-4, 2)], ids=["official", "diffusers", "own"])
def test_flavour_survives_until_diffusers_saves_again(flavour: str | Flavour, tmp_path: Path) -> None:
    config = small(flavour=flavour)
    save_checkpoint(load_checkpoint(weights_of(config), config=config), tmp_path / "ours", layout="diffusers")
    assert load_checkpoint(tmp_path / "ours").config == config
    diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours", **PLAIN_LOAD).save_pretrained(tmp_path / "theirs")
    eps = config.arithmetic.mlp_norm_eps
    assert load_checkpoint(tmp_path / "theirs").config.arithmetic == FLAVOURS["diffusers"]._replace(mlp_norm_eps=eps)


def test_an_edited_config_json_contradicts_ours(tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(weights_of(small()), config=small()), tmp_path / "ours", layout="diffusers")
    file = tmp_path / "ours" / "config.json"
    file.write_text(file.read_text().replace('"norm_eps": 1e-06', '"norm_eps": 1e-05'))
    with pytest.raises(CheckpointError, match=r"config\.json: norm_eps: got 1e-05, but _ditfast says 1e-06"):
        load_checkpoint(tmp_path / "ours")


def test_diffusers_loads_ours_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small(flavour="diffusers")
    ours = load_checkpoint(weights_of(config), config=config)
    save_checkpoint(ours, tmp_path / "ours", layout="diffusers")
    diffusers.utils.logging.set_verbosity_warning()
    capfd.readouterr()
    theirs, report = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True, **PLAIN_LOAD)
    assert not any(report.values())
    assert capfd.readouterr() == ("", "")
    assert error(*outputs(ours, theirs.eval())) < 1e-5


def test_names_are_diffusers_own() -> None:
    theirs, ours = their_model().state_dict(), to_diffusers(weights_of(small()))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"input_size": (8, 16)}, r"input_size: got \(8, 16\), but diffusers' class has square grids only"),
        ({"mlp_ratio": 2.0}, "mlp_ratio: got 2.0, but diffusers' class has 4 only"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob: got 0, but diffusers' class always has a row for no class"),
        ({"conditioning": "adaln"}, "conditioning: got 'adaln', but diffusers' class has 'adaln_zero' only"),
        ({"conditioning": "cross_attention"}, "conditioning: got 'cross_attention'"),
        ({"conditioning": "in_context"}, "conditioning: got 'in_context'"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_diffusers_cannot_hold(fields: dict[str, object], fault: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=fault):
        save_checkpoint(DiT(small(**fields)), tmp_path / "theirs", layout="diffusers")
    assert list(tmp_path.iterdir()) == []


def test_positions_that_diffusers_would_not_recompute(tmp_path: Path) -> None:
    model = DiT(small())
    model.pos_embed[0, 3, 5] += 0.5
    with pytest.raises(CheckpointError, match=r"pos_embed: differs by up to 0\.5 from the sine-cosine positions"):
        save_checkpoint(model, tmp_path / "theirs", layout="diffusers")
    rounded = ditfast.load_digits()  # stored in bf16
    with pytest.raises(CheckpointError, match=r"pos_embed: differs by up to 0\.00\d+ from"):
        save_checkpoint(rounded, tmp_path / "theirs", layout="diffusers")
    save_checkpoint(rounded.bfloat16(), tmp_path / "theirs", layout="diffusers")
    assert load_checkpoint(tmp_path / "theirs").config == rounded.config


def test_a_design_that_diffusers_has_not() -> None:
    with pytest.raises(CheckpointError, match="config: got conditioning 'adaln', expected 'adaln_zero'"):
        load_checkpoint(their_model().state_dict(), config=DiTConfig(**{**SMALL, "conditioning": "adaln"}))  # type: ignore[arg-type]
