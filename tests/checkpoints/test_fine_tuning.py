"""``load_checkpoint`` with other classes and sizes, on another device, in another dtype, from a larger state dict."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_files import inputs, known_width, same_weights, saved, small, weights_of
from torch.nn import functional as F

from ditfast import CheckpointError, DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.model import sincos_positions

STATE = weights_of(small())
LABELS, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"


def changed(state: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name not in names}


# ------------------------------------------------------------------------------------------------ the label table
@pytest.mark.parametrize("num_classes", [3, 20])
def test_other_classes_have_a_fresh_table_and_the_old_row_for_none(num_classes: int) -> None:
    with pytest.warns(
        UserWarning, match=rf"^state dict: a fresh label table of {num_classes} classes, not 10, the row for no "
    ):
        model = load_checkpoint(STATE, config=small(), num_classes=num_classes)
    assert model.config == small(num_classes=num_classes)
    table = model.state_dict()[LABELS]
    assert table.shape == (num_classes + 1, 48)
    assert torch.equal(table[-1], STATE[LABELS][-1])
    assert 0.01 < table[:-1].std() < 0.03, "as a new model's, a normal distribution of 0.02"
    assert table[:-1].unique().numel() > table[:-1].numel() // 2
    assert same_weights(changed(model.state_dict(), LABELS), changed(STATE, LABELS))
    assert model(*inputs(model.config)).isfinite().all()


@pytest.mark.parametrize(
    ("stored", "asked", "said"),
    [
        ({}, {"class_dropout_prob": 0.0}, "labels, no row for no class"),
        ({"class_dropout_prob": 0.0}, {"class_dropout_prob": 0.1}, "labels, a fresh row for no class"),
        ({"class_dropout_prob": 0.0}, {"num_classes": 4}, "a fresh label table of 4 classes, not 10, no row for no class"),
    ],
    ids=["null row goes", "null row comes", "never had one"],
)
def test_the_row_for_no_class(stored: dict[str, object], asked: dict[str, object], said: str) -> None:
    state = weights_of(small(**stored))
    with pytest.warns(UserWarning, match=f"^state dict: {said}$"):
        model = load_checkpoint(state, config=small(**stored), **asked)
    assert model.config == small(**{**stored, **asked})
    if "num_classes" not in asked:
        assert torch.equal(model.state_dict()[LABELS][:10], state[LABELS][:10])


def test_a_seed_draws_the_same_table() -> None:
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="a fresh label table"):
            tables.append(load_checkpoint(STATE, config=small(), num_classes=20).state_dict()[LABELS])
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


# ------------------------------------------------------------------------------------------------ the positions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("input_size", [16, (4, 12)], ids=["larger", "wide"])
def test_sine_cosine_positions_are_computed_anew(input_size: int | tuple[int, int], dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"^state dict: sine-cosine positions for a grid of \d+ x \d+, not 4 x 4$"):
        model = load_checkpoint(weights_of(small(), dtype), config=small(), input_size=input_size)
    assert model.config == small(input_size=input_size)
    assert torch.equal(model.pos_embed, sincos_positions(model.config).to(dtype))
    assert model(*inputs(model.config, dtype)).isfinite().all()


def test_learned_positions_are_interpolated() -> None:
    state = {**STATE, POSITIONS: torch.randn(1, 16, 48)}
    with pytest.warns(UserWarning, match="^state dict: interpolated positions for a grid of 6 x 8, not 4 x 4$"):
        model = load_checkpoint(state, config=small(), input_size=(12, 16))
    grid = state[POSITIONS].view(4, 4, 48).permute(2, 0, 1)[None]  # [1, D, h, w]
    for channel in range(48):
        resized = F.interpolate(grid[:, channel : channel + 1], (6, 8), mode="bicubic")[0, 0]
        torch.testing.assert_close(model.pos_embed[0, :, channel].view(6, 8), resized)


def test_a_diffusers_folder_for_fine_tuning(tmp_path: Path) -> None:
    load_checkpoint(STATE, config=small()).save_pretrained(tmp_path / "x")
    with pytest.warns(UserWarning, match="a fresh label table of 2 .*; sine-cosine positions for"):
        model = load_checkpoint(tmp_path / "x", num_classes=2, input_size=16)
    assert model.config == small(num_classes=2, input_size=16)
    save_checkpoint(model, tmp_path / "y.pt")
    assert load_checkpoint(tmp_path / "y.pt").config == model.config


# ------------------------------------------------------------------------------------------------ what may be asked for
def test_what_is_as_it_was_is_not_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_checkpoint(STATE, config=small(), num_classes=10, input_size=(8, 8), in_channels=4, class_dropout_prob=0.2)
    assert model.config == small(class_dropout_prob=0.2)
    assert same_weights(model.state_dict(), STATE)


def test_the_callers_state_dict_stays_as_it_is() -> None:
    before = {name: value.clone() for name, value in STATE.items()}
    with pytest.warns(UserWarning, match="a fresh label table"):
        model = load_checkpoint(STATE, config=small(), num_classes=20, input_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same_weights(STATE, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", 3),
        ("patch_size", 4),
        ("depth", 1),
        ("hidden_size", 64),
        ("num_heads", 5),
        ("learn_sigma", False),
        ("mlp_ratio", 2.0),
        ("conditioning", "adaln"),
    ],
)
def test_what_the_weights_are_is_not_changed(name: str, value: object) -> None:
    stored = getattr(small(), name)
    with pytest.raises(CheckpointError, match=rf"^state dict: {name}: got {value!r}, but the weights are of {stored!r}, which"):
        load_checkpoint(STATE, config=small(), **{name: value})


def test_heads_that_the_weights_do_not_tell(tmp_path: Path) -> None:
    assert load_checkpoint(STATE, num_heads=4).config == small()
    assert load_checkpoint(weights_of(known_width()), num_heads=12).config == known_width(num_heads=12)
    for asked in (5, 0, "4"):
        fault = f"^state dict: num_heads: got {asked!r}, expected a divisor of the width 48$"
        with pytest.raises(CheckpointError, match=fault):
            load_checkpoint(STATE, num_heads=asked)
    path = saved({"ema": STATE, "args": {"num_heads": 4}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="num_heads: got 2, but the weights are of 4"):
        load_checkpoint(path, num_heads=2)


@pytest.mark.parametrize(
    ("asked", "fault", "kind"),
    [
        ({"num_classes": 0}, "num_classes: got 0, expected a positive integer", ValueError),
        ({"input_size": 9}, "input_size: got 9, expected multiples of patch_size=2", ValueError),
        ({"classes": 20}, "classes: got 20, but load_checkpoint has no such argument, expected .*num_classes", TypeError),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of fp32, bf16, fp16, float32, bfloat16, float16", ValueError),
        ({"dtype": torch.float64}, "dtype: got torch.float64, expected one of fp32", ValueError),
        ({"device": "gpu"}, "device: got 'gpu', but .*cuda", ValueError),
        ({"prefix": "dit"}, r"prefix: got 'dit', but names begin with blocks\., final_layer\., pos_embed\., ", CheckpointError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be(asked: dict[str, object], fault: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=fault):
        load_checkpoint(STATE, config=small(), **asked)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ device, dtype, prefix
@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16], ids=str)
def test_weights_are_rounded_to_a_dtype(dtype: str | torch.dtype) -> None:
    model = load_checkpoint(STATE, config=small(), dtype=dtype, device="cpu")
    assert same_weights(model.state_dict(), {name: value.bfloat16() for name, value in STATE.items()})
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))


def test_a_dtype_that_cannot_hold_the_weights() -> None:
    state = {name: value.clone() for name, value in STATE.items()}
    state["blocks.1.mlp.fc1.bias"][3] = 1e5
    with pytest.raises(
        CheckpointError, match=r"dtype: got torch.float16, which cannot hold blocks\.1\.mlp\.fc1\.bias \(1 of 192"
    ):
        load_checkpoint(state, config=small(), dtype="fp16")


@pytest.mark.gpu
def test_weights_on_a_gpu() -> None:
    model = load_checkpoint(STATE, config=small(), device="cuda", dtype="bf16")
    assert {p.device.type for p in model.parameters()} == {"cuda"}


@pytest.mark.parametrize("prefix", ["model.dit", "model.dit.", "module.model.dit."])
def test_a_prefix_takes_one_model_out_of_a_larger_state_dict(prefix: str, tmp_path: Path) -> None:
    other = weights_of(small(), seed=1)
    content = {f"model.dit.{name}": value for name, value in STATE.items()} | {"vae.conv.weight": torch.randn(2)}
    content |= {f"model.teacher.{name}": value for name, value in other.items()}
    path = saved({"state_dict": {f"module.{name}": value for name, value in content.items()}}, tmp_path / "x.pt")
    assert same_weights(load_checkpoint(path, config=small(), prefix=prefix).state_dict(), STATE)
    with pytest.raises(CheckpointError, match=r"several models, under 'model.dit.' and 'model.teacher.', .* give its prefix="):
        load_checkpoint(path, config=small())


def test_the_paper_by_name() -> None:
    with torch.device("meta"):
        model = DiT.from_name("DiT-S/4", image_size=(128, 256), num_classes=3, depth=1)
    assert model.config == DiTConfig.from_name("DiT-S/4", image_size=(128, 256), num_classes=3, depth=1)
    assert known_width().hidden_size == model.config.hidden_size
