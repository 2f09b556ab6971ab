"""Every file that ditfast writes gives back the config and the bits that were saved, and official readers still read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_files import inputs, known_width, oracle_of, same_weights, saved, small, weights_of
from support import error

from ditfast import CheckpointError, DiT, DiTConfig, load_checkpoint, reference, save_checkpoint
from ditfast.cli import main
from ditfast.config import CONDITIONINGS, Flavour


def to_pt(model: DiT, folder: Path) -> Path:
    save_checkpoint(model, folder / "x.pt")
    return folder / "x.pt"


def to_safetensors(model: DiT, folder: Path) -> Path:
    save_checkpoint(model, folder / "x.safetensors")
    return folder / "x.safetensors"


def to_folder(model: DiT, folder: Path) -> Path:
    model.save_pretrained(folder / "x")
    return folder / "x"


def converted(model: DiT, folder: Path) -> Path:
    assert main(["convert", str(to_safetensors(model, folder)), str(folder / "y.pt"), "--to", "official"]) == 0
    return folder / "y.pt"


def converted_alone(model: DiT, folder: Path) -> Path:
    """Weights of diffusers' layout without the config.json beside; official ones where diffusers cannot hold the model."""
    (to_folder(model, folder) / "config.json").unlink()
    return folder / "x"


WRITERS = (to_pt, to_safetensors, to_folder, converted, converted_alone)
CONFIGS = {
    "width 64": small(hidden_size=64),
    "12 heads of 32": known_width(num_heads=12),
    "1 head": small(num_heads=1),
    "square": small(num_classes=1000, learn_sigma=False),
    "wide": small(input_size=(4, 12), patch_size=4, in_channels=3),
    "odd mlp": small(mlp_ratio=3.3, flavour="diffusers"),
    "no null class": known_width(class_dropout_prob=0.0),
    "flavour of its own": small(flavour=Flavour(100, 1e-4, None), class_dropout_prob=0.25),
    **{design: small(conditioning=design, num_heads=2, input_size=(8, 4)) for design in CONDITIONINGS},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_file_gives_back_its_config_and_its_bits(
    write: Callable[[DiT, Path], Path], name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    before = load_checkpoint(weights_of(config, dtype), config=config)
    after = load_checkpoint(write(before, tmp_path))
    assert after.config == config
    assert same_weights(after.state_dict(), before.state_dict())


def test_a_model_of_12_heads_computes_the_same_after_a_pt(tmp_path: Path) -> None:
    config = known_width(num_heads=12)
    state = weights_of(config)
    again = load_checkpoint(to_pt(load_checkpoint(state, config=config), tmp_path))
    with torch.no_grad():
        assert error(again(*inputs(config)), oracle_of(config, state)(*inputs(config))) < 1e-5


def test_the_official_reader_reads_a_pt(tmp_path: Path) -> None:
    state = weights_of(small())
    content = torch.load(to_pt(load_checkpoint(state, config=small()), tmp_path), weights_only=True)
    if "ema" in content:  # as the official sample.py does
        content = content["ema"]
    reference.DiT(small()).load_state_dict(content)
    assert same_weights(content, state)


def test_a_pts_config_is_plain(tmp_path: Path) -> None:
    config = small(input_size=(8, 12), flavour=Flavour(100, 1e-4, None))
    content = torch.load(to_pt(DiT(config), tmp_path), weights_only=True)
    assert DiTConfig(**content["config"]) == config
    assert json.loads(json.dumps(content["config"])) == content["config"]


def test_our_own_weights_have_no_name(tmp_path: Path) -> None:
    path = to_pt(DiT(small()), tmp_path)
    for weights, name in (("auto", "unnamed"), ("ema", "ema")):
        source = load_checkpoint(path, weights=weights).source
        assert source is not None
        assert source.weights == name
    with pytest.raises(CheckpointError, match="weights: got 'model', but it holds ema only"):
        load_checkpoint(path, weights="model")


def test_anothers_config_beside_weights_is_no_config_of_ours(tmp_path: Path) -> None:
    theirs = {"depth": 2, "hidden_size": 384, "num_heads": 12}  # names that the official class shares
    found = load_checkpoint(saved({"ema": weights_of(known_width()), "config": theirs}, tmp_path / "x.pt")).config
    assert found == known_width(num_heads=12)
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    safetensors.torch.save_file(weights_of(known_width()), tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path).config == known_width()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"num_heads": 0}, "config: num_heads: got 0, expected a positive integer"),
        ({"of_a_later_version": 1}, "config: .*unexpected keyword argument 'of_a_later_version'"),
        ({"num_classes": 11}, r"misshapen y_embedder.embedding_table.weight \(got \[11, 48\], expected \[12, 48\]\)"),
    ],
    ids=["wrong", "unknown", "of other weights"],
)
def test_a_wrong_config_is_refused(change: dict[str, object], fault: str, tmp_path: Path) -> None:
    content = torch.load(to_pt(DiT(small()), tmp_path), weights_only=True)
    content["config"] |= change
    with pytest.raises(CheckpointError, match=fault):
        load_checkpoint(content)


def test_a_given_config_is_held_against_a_pts(tmp_path: Path) -> None:
    path = to_pt(DiT(small()), tmp_path)
    with pytest.raises(CheckpointError, match="config: got num_heads 2 where the checkpoint says 4"):
        load_checkpoint(path, config=small(num_heads=2))
