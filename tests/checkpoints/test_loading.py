"""From files, folders and state dicts to models."""

import copy
import dataclasses
import logging
import math
import pickle
from pathlib import Path

import pytest
import torch
from checkpoint_files import inputs, known_width, oracle_of, same_weights, saved, small, training_checkpoint, weights_of
from safetensors.torch import save_file
from support import DTYPES, assert_as_good_as, error

from ditfast import CheckpointError, DiTConfig, load_checkpoint
from ditfast.config import CONDITIONINGS

EMA, MODEL = weights_of(small(), seed=1), weights_of(small(), seed=2)
TRAINING = training_checkpoint(ema=EMA, model=MODEL)


# ------------------------------------------------------------------------------------------------ which weights
@pytest.mark.parametrize(
    ("content", "weights", "found", "name"),
    [
        pytest.param(MODEL, "auto", MODEL, "unnamed", id="flat"),
        pytest.param(TRAINING, "auto", EMA, "ema", id="training-auto"),
        pytest.param(TRAINING, "ema", EMA, "ema", id="training-ema"),
        pytest.param(TRAINING, "model", MODEL, "model", id="training-model"),
        pytest.param({"model": MODEL}, "auto", MODEL, "model", id="model-auto"),
        pytest.param({"state_dict": MODEL, "epoch": 3}, "auto", MODEL, "model", id="state_dict-auto"),
        pytest.param({"state_dict": MODEL}, "model", MODEL, "model", id="state_dict-model"),
        pytest.param({"ema": EMA}, "auto", EMA, "ema", id="ema-auto"),
    ],
)
def test_takes_the_weights_asked_for(content: object, weights: str, found: object, name: str, tmp_path: Path) -> None:
    model = load_checkpoint(saved(content, tmp_path / "x.pt"), weights=weights, config=small())
    assert same_weights(model.state_dict(), found)  # type: ignore[arg-type]
    assert model.source is not None
    assert model.source.weights == name


@pytest.mark.parametrize(
    ("content", "weights", "held"),
    [
        pytest.param({"model": MODEL}, "ema", "got 'ema', but it holds model only", id="model"),
        pytest.param({"ema": EMA}, "model", "got 'model', but it holds ema only", id="ema"),
        pytest.param(MODEL, "ema", "got 'ema', but it holds one unnamed set of weights only", id="flat"),
    ],
)
def test_says_which_weights_there_are(content: dict[str, object], weights: str, held: str) -> None:
    with pytest.raises(CheckpointError, match=f"state dict: weights: {held}"):
        load_checkpoint(content, weights=weights, config=small())


def test_weights_is_checked() -> None:
    with pytest.raises(ValueError, match="weights: got 'EMA', expected one of auto, ema, model"):
        load_checkpoint(MODEL, weights="EMA")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    prefixed = {prefix + name: value for name, value in MODEL.items()}
    for content in (prefixed, {"model": prefixed}):
        model = load_checkpoint(saved(content, tmp_path / "x.pt"), config=small())
        assert same_weights(model.state_dict(), MODEL)


def test_prefixes_of_blocks_compiled_one_by_one() -> None:
    prefixed = {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in MODEL.items()}
    assert same_weights(load_checkpoint(prefixed, config=small()).state_dict(), MODEL)


def test_a_name_that_is_there_twice() -> None:
    twice = {**MODEL, "module.pos_embed": MODEL["pos_embed"]}
    with pytest.raises(CheckpointError, match=r"twice, once module. or _orig_mod. is stripped: pos_embed"):
        load_checkpoint(twice, config=small())


# ------------------------------------------------------------------------------------------------ the config
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="ten-classes"),
        *(pytest.param({"conditioning": design}, id=design) for design in CONDITIONINGS if design != "adaln"),
        pytest.param({"input_size": (8, 16)}, id="wide"),
        pytest.param({"input_size": (12, 4)}, id="high"),
        pytest.param({"input_size": (2, 16)}, id="rectangle-of-a-square-number-of-tokens"),
        pytest.param({"learn_sigma": False}, id="no-variances"),
        pytest.param({"in_channels": 3, "patch_size": 4}, id="three-channels-patch-4"),
        pytest.param({"mlp_ratio": 1001 / 384}, id="odd-mlp"),
        pytest.param({"depth": 3}, id="three-blocks"),
        pytest.param({"hidden_size": 768, "num_heads": 12}, id="width-768"),
        pytest.param({"hidden_size": 1024, "num_heads": 16}, id="width-1024"),
        pytest.param({"hidden_size": 1152, "num_heads": 16}, id="width-1152"),
    ],
)
def test_config_is_read_off_the_weights(fields: dict[str, object]) -> None:
    config = known_width(**{"depth": 1, **fields})
    found = load_checkpoint(weights_of(config, torch.bfloat16)).config  # rounding blurs the positions
    assert found.mlp_hidden_size == config.mlp_hidden_size
    assert dataclasses.replace(found, mlp_ratio=config.mlp_ratio) == config


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(small(), id="width-48"),
        pytest.param(small(hidden_size=44, mlp_ratio=math.nextafter(49 / 44, 2)), id="an-mlp-width-that-truncation-misses"),
    ],
)
def test_heads_of_another_width_are_asked_for(config: DiTConfig) -> None:
    with pytest.raises(CheckpointError, match=r"num_heads: unknown.*none of the paper's \(384, 768, 1024, 1152\)") as caught:
        load_checkpoint(weights_of(config))
    call = str(caught.value).partition("give config=")[2].replace("...", "4")
    assert eval(call, {"DiTConfig": DiTConfig}) == config


def test_positions_of_no_grid() -> None:
    state = weights_of(known_width())
    state["pos_embed"] = torch.randn(1, 16, 384)
    assert load_checkpoint(state).config.grid == (4, 4)
    state["pos_embed"] = torch.randn(1, 12, 384)
    with pytest.raises(CheckpointError, match="input_size: unknown, as pos_embed holds 12 positions"):
        load_checkpoint(state)
    assert load_checkpoint(state, config=known_width(input_size=(4, 12))).config.grid == (2, 6)


def test_a_table_without_a_null_class() -> None:
    config = known_width(class_dropout_prob=0.0)
    state = weights_of(config)
    assert load_checkpoint(state).config.num_classes == 9
    assert load_checkpoint(state, config=config).config == config


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"depth": 3}, r"missing blocks\.2\.attn\.qkv\.weight, .* and 2 more"),
        ({"depth": 1}, r"unexpected blocks\.1\.attn\.qkv\.weight"),
        ({"num_classes": 11}, r"misshapen y_embedder\.embedding_table\.weight \(got \[11, 48\], expected \[12, 48\]\)"),
        ({"conditioning": "adaln"}, r"adaLN_modulation\.1\.bias \(got \[288\], expected \[192\]\)"),
        ({"input_size": (4, 16)}, r"got the positions of a grid of \(4, 4\), expected \(2, 8\) for input_size=\(4, 16\)"),
    ],
)
def test_config_is_checked(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        load_checkpoint(MODEL, config=small(**fields))


def test_every_fault_is_told_at_once() -> None:
    state = dict(MODEL)
    del state["x_embedder.proj.bias"]
    state["extra"] = torch.zeros(2)
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(5, 48)
    state["blocks.0.mlp.fc2.bias"] = torch.full((48,), torch.nan)
    state["t_embedder.mlp.0.bias"] = state["t_embedder.mlp.0.bias"].double()
    for config in (small(), None):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(state, config=config)
        told = str(caught.value)
        assert "missing x_embedder.proj.bias; unexpected extra" in told
        assert "not finite blocks.0.mlp.fc2.bias (48 of 48 values)" in told
        assert "of another dtype t_embedder.mlp.0.bias (got torch.float64, expected torch.float32)" in told
        if config is not None:
            assert "misshapen blocks.1.mlp.fc1.weight (got [5, 48], expected [192, 48])" in told


def test_misshapen_is_told_without_a_config() -> None:
    state = weights_of(known_width())
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(5, 384)
    with pytest.raises(
        CheckpointError, match=r"misshapen blocks\.1\.mlp\.fc1\.weight \(got \[5, 384\], expected \[1536, 384\]\)$"
    ):
        load_checkpoint(state)


def test_a_stray_high_number_is_no_depth() -> None:
    with pytest.raises(CheckpointError, match=r"unexpected blocks\.9999\.attn\.qkv\.weight"):
        load_checkpoint({**MODEL, "blocks.9999.attn.qkv.weight": torch.zeros(2)})


# ------------------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fields", [{}, {"input_size": (8, 12)}], ids=["square", "rectangular"])
def test_outputs_are_the_references(fields: dict[str, object], dtype: str, tmp_path: Path) -> None:
    config = known_width(**fields)
    state = weights_of(config, DTYPES[dtype])
    model = load_checkpoint(saved(training_checkpoint(state, MODEL), tmp_path / "x.pt"))
    oracle, (x, t, y) = oracle_of(config, state), inputs(config, DTYPES[dtype])
    with torch.no_grad():
        out, eager = model(x, t, y), oracle(x, t, y)
        assert_as_good_as(out, oracle.double()(x.double(), t, y), eager)


def test_is_ready_to_use() -> None:
    state = weights_of(known_width(), torch.bfloat16)
    generator = torch.get_rng_state()
    model = load_checkpoint(state)
    assert not model.training
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert torch.equal(torch.get_rng_state(), generator), "loading must not draw random numbers"


def test_positions_in_fp32_beside_half_precision() -> None:
    state = weights_of(known_width(), torch.bfloat16)
    expected = dict(state)
    state["pos_embed"] = weights_of(known_width())["pos_embed"]
    assert same_weights(load_checkpoint(state).state_dict(), expected)


@pytest.mark.parametrize("kind", ["official", "diffusers"])
def test_training_leaves_the_callers_state_dict_alone(kind: str) -> None:
    from ditfast.checkpoints.layouts import to_diffusers

    state = MODEL if kind == "official" else to_diffusers(MODEL)
    before = copy.deepcopy(state)
    model = load_checkpoint(state, config=small())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same_weights(state, before)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_outlives_its_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "pt":
        torch.save(MODEL, path)
    else:
        save_file(MODEL, path)
    model = load_checkpoint(path, config=small())
    with path.open("r+b") as file:  # in place: a memory map would see it
        file.write(b"\xff" * path.stat().st_size)
    assert same_weights(model.state_dict(), MODEL)


def test_kinds_are_told_by_content(tmp_path: Path) -> None:
    save_file(MODEL, tmp_path / "safetensors.pt")
    saved(MODEL, tmp_path / "torch.safetensors")
    saved(training_checkpoint(MODEL, EMA), tmp_path / "legacy.safetensors", _use_new_zipfile_serialization=False)
    for name in ("safetensors.pt", "torch.safetensors", "legacy.safetensors"):
        assert same_weights(load_checkpoint(tmp_path / name, config=small()).state_dict(), MODEL), name


def test_a_safetensors_file_that_begins_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for padding in range(300):
        save_file(MODEL, path, metadata={"padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert same_weights(load_checkpoint(path, config=small()).state_dict(), MODEL)


# ------------------------------------------------------------------------------------------------ what it says
def test_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = known_width(num_classes=1000)
    path = saved(training_checkpoint(weights_of(config), MODEL), tmp_path / "x.pt")
    with caplog.at_level(logging.INFO, logger="ditfast"):
        model = load_checkpoint(path)
    said = (
        f"ema weights, official layout, from {path}; official flavour: timestep frequencies over 128, second norm eps 1e-06, "
        "guidance on 3 channels, null class 1000"
    )
    assert str(model.source) == said
    assert caplog.messages == [said]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.source == model.source


def test_source_of_a_state_dict_and_another_flavour() -> None:
    config = small(flavour=(100, 1e-4, 1), class_dropout_prob=0.0)
    model = load_checkpoint(weights_of(config), config=config)
    assert str(model.source) == (
        "unnamed weights, official layout, from a state dict; own flavour: timestep frequencies over 100, "
        "second norm eps 0.0001, guidance on 1 channels, no null class"
    )
    assert error(model(*inputs(config)), oracle_of(config, weights_of(config))(*inputs(config))) < 1e-5
