"""What training code wraps weights in: names of sets of weights, prefixes, heads for training only, wider dtypes, variants."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import known_width, same_weights, saved, small, weights_of
from safetensors.torch import save_file
from torch import Tensor

from ditfast import CheckpointError, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.cli import main

EMA, MODEL = weights_of(small(), seed=1), weights_of(small(), seed=2)


def prefixed(prefix: str, state: dict[str, Tensor] = MODEL) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


# ------------------------------------------------------------------------------------------------ sets of weights
@pytest.mark.parametrize(
    ("content", "weights", "found", "name"),
    [
        pytest.param({"model_state_dict": MODEL, "epoch": 3}, "auto", MODEL, "model", id="model_state_dict"),
        pytest.param({"model_state_dict": MODEL, "ema_state_dict": EMA}, "auto", EMA, "ema", id="ema_state_dict"),
        pytest.param({"ema_state_dict": EMA, "model_state_dict": MODEL}, "model", MODEL, "model", id="model-of-both"),
        pytest.param({"module": MODEL, "optimizer": None}, "auto", MODEL, "model", id="deepspeed"),
        pytest.param({"model": {"module": MODEL}, "ema": {"module": EMA}}, "auto", EMA, "ema", id="nested-ema"),
        pytest.param({"model": {"module": MODEL}, "ema": {"module": EMA}}, "model", MODEL, "model", id="nested-model"),
        pytest.param({"state_dict": {"model": MODEL, "ema": EMA}}, "ema", EMA, "ema", id="both-within"),
        pytest.param({"ema": {}, "model": MODEL}, "auto", MODEL, "model", id="empty-ema"),
        pytest.param({"ema": None, "model": MODEL}, "auto", MODEL, "model", id="no-ema"),
        pytest.param({"model_ema": EMA, "state_dict": MODEL}, "auto", EMA, "ema", id="model_ema"),
        pytest.param({"net": MODEL}, "model", MODEL, "model", id="net"),
    ],
)
def test_sets_of_weights_by_their_names(
    content: object, weights: str, found: dict[str, Tensor], name: str, tmp_path: Path
) -> None:
    model = load_checkpoint(saved(content, tmp_path / "x.pt"), weights=weights, config=small())
    assert same_weights(model.state_dict(), found)
    assert model.source is not None
    assert model.source.weights == name


def test_a_dict_that_holds_itself_ends() -> None:
    content: dict[str, object] = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="this is no DiT"):
        load_checkpoint(content)


# ------------------------------------------------------------------------------------------------ prefixes
PREFIXES = (
    *("model.", "net.", "_orig_mod.model.", "model._orig_mod.", "module.model.", "model.module._orig_mod.", "dit.", "a.b.c."),
    *("_fsdp_wrapped_module.", "model.diffusion_model."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_any_order(prefix: str) -> None:
    for content in (prefixed(prefix), {"state_dict": prefixed(prefix)}):
        assert same_weights(load_checkpoint(content, config=small()).state_dict(), MODEL)


def test_prefixes_within_blocks() -> None:
    state = prefixed("model.")
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        state = {name.replace("blocks.1.", f"blocks.1.{wrapper}."): value for name, value in state.items()}
    assert same_weights(load_checkpoint(state, config=small()).state_dict(), MODEL)


def test_prefixes_of_diffusers() -> None:
    from ditfast.checkpoints.layouts import to_diffusers

    state = {f"module.transformer.{name}": value for name, value in to_diffusers(MODEL).items()}
    assert same_weights(load_checkpoint(state, config=small()).state_dict(), MODEL)


def test_names_without_the_prefix_are_unexpected() -> None:
    with pytest.raises(CheckpointError, match=r"unexpected vae\.encoder\.weight$"):
        load_checkpoint({**prefixed("model."), "vae.encoder.weight": torch.zeros(2)}, config=small())


def test_a_missing_weight_is_told_behind_a_prefix() -> None:
    state = prefixed("model.")
    del state["model.x_embedder.proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing x_embedder\.proj\.weight$"):
        load_checkpoint(state, config=small())


def test_several_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"got several models, under 'student\.' and 'teacher\.', expected one"):
        load_checkpoint({**prefixed("student."), **prefixed("teacher.", EMA)}, config=small())


def test_a_name_that_is_there_with_and_without_the_prefix() -> None:
    with pytest.raises(CheckpointError, match=r"twice, once 'model\.' is stripped: pos_embed"):
        load_checkpoint({**prefixed("model."), "pos_embed": MODEL["pos_embed"]}, config=small())


# ------------------------------------------------------------------------------------------------ heads for training only
HEADS = ("projectors.0.0.weight", "projectors.0.4.bias", "projector.weight", "ap_head.linear1.weight", "proj_head.0.bias")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_heads_for_training_are_left_out_aloud(prefix: str, tmp_path: Path) -> None:
    state = prefixed(prefix) | {prefix + name: torch.full((2,), torch.nan) for name in HEADS}
    path = saved({"ema": state}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match=rf"x\.pt: left out, as they are no weights of a DiT: {', '.join(HEADS)}$"):
        model = load_checkpoint(path, config=small())
    assert same_weights(model.state_dict(), MODEL)


def test_the_command_says_what_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*warning: Any, **_: Any) -> None:
        sys.stderr.write(warnings.formatwarning(*warning[:4]))

    monkeypatch.setattr(warnings, "showwarning", shown)  # as without pytest
    path = saved({**weights_of(known_width()), "projectors.0.0.bias": torch.zeros(2)}, tmp_path / "x.pt")
    capfd.readouterr()
    assert main(["convert", str(path), str(tmp_path / "out.safetensors"), "--to", "official"]) == 0
    said = capfd.readouterr().err
    assert said == f"ditfast convert: warning: {path}: left out, as they are no weights of a DiT: projectors.0.0.bias\n"


def test_averages_of_torch_count_their_steps() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1)).state_dict()
    assert "n_averaged" in averaged
    with pytest.warns(UserWarning, match="n_averaged"):
        model = load_checkpoint({"n_averaged": averaged["n_averaged"], **prefixed("module.")}, config=small())
    assert same_weights(model.state_dict(), MODEL)


@pytest.mark.parametrize("name", ["head.weight", "cls_token", "blocks.0.projectors.weight", "decoder.projectors.0.weight"])
def test_other_weights_are_not_left_out(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"unexpected {name}"):
        load_checkpoint({**MODEL, name: torch.zeros(2)}, config=small())


# ------------------------------------------------------------------------------------------------ the design
def test_four_vectors_a_block_are_not_taken_for_the_papers(tmp_path: Path) -> None:
    """Scales and gates without shifts have the same names and shapes as the paper's shifts and scales."""
    config = known_width(conditioning="adaln")
    state = weights_of(config)
    with pytest.raises(CheckpointError, match=r"conditioning: unknown, as 4 adaLN vectors a block .* give config=") as caught:
        load_checkpoint(saved(state, tmp_path / "x.pt"))
    call = str(caught.value).partition("give config=")[2]
    given = eval(call, {"DiTConfig": DiTConfig})
    assert given == config
    save_checkpoint(load_checkpoint(state, config=given), tmp_path / "x.safetensors")
    assert load_checkpoint(tmp_path / "x.safetensors").config == config


# ------------------------------------------------------------------------------------------------ float64
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_float64_is_loaded_in_fp32_aloud(kind: str, tmp_path: Path) -> None:
    doubles = {name: value.double() + 2.0**-40 for name, value in MODEL.items()}
    path = tmp_path / f"x.{kind}"
    saved(doubles, path) if kind == "pt" else save_file(doubles, path)
    with pytest.warns(UserWarning, match=rf"x\.{kind}: its float64 weights are rounded to float32$"):
        model = load_checkpoint(path, config=small())
    assert same_weights(model.state_dict(), {name: value.float() for name, value in doubles.items()})


def test_positions_in_float64_are_rounded() -> None:
    state = {**MODEL, "pos_embed": MODEL["pos_embed"].double()}
    assert same_weights(load_checkpoint(state, config=small()).state_dict(), MODEL)


def test_float64_beyond_fp32_is_refused() -> None:
    state = {name: value.double() for name, value in MODEL.items()}
    state["blocks.1.attn.proj.bias"][3] = 1e300
    with (
        pytest.warns(UserWarning, match="rounded"),
        pytest.raises(CheckpointError, match=r"not finite blocks\.1\.attn\.proj\.bias \(1 of 48 values\)$"),
    ):
        load_checkpoint(state, config=small())


# ------------------------------------------------------------------------------------------------ variants
def folder_with(tmp_path: Path, variant: str, shards: bool = False, beside: bool = False) -> Path:
    """A diffusers folder with the weights of EMA in a variant, and those of MODEL beside them."""
    folder = tmp_path / "model" / "transformer"
    folder.parent.mkdir()
    save_checkpoint(load_checkpoint(EMA, config=small()), folder, layout="diffusers")
    name = "diffusion_pytorch_model"
    if shards:
        from safetensors.torch import load_file

        state = load_file(folder / f"{name}.safetensors")
        (folder / f"{name}.safetensors").unlink()
        parts = {f"{name}.{variant}-0000{k + 1}-of-00002.safetensors": list(state)[k::2] for k in range(2)}
        for file, names in parts.items():
            save_file({each: state[each] for each in names}, folder / file)
        index = {"weight_map": {each: file for file, names in parts.items() for each in names}}
        (folder / f"{name}.safetensors.index.{variant}.json").write_text(json.dumps(index))
    else:
        (folder / f"{name}.safetensors").rename(folder / f"{name}.{variant}.safetensors")
    if beside:
        save_checkpoint(load_checkpoint(MODEL, config=small()), tmp_path / "plain", layout="diffusers")
        (tmp_path / "plain" / f"{name}.safetensors").rename(folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_a_variant_of_a_folder(shards: bool, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "fp16", shards)
    for path in (folder, folder.parent):
        assert same_weights(load_checkpoint(path, variant="fp16").state_dict(), EMA)
        with pytest.raises(CheckpointError, match=r"expected diffusion_pytorch_model\.safetensors or .*; give variant='fp16'"):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"expected diffusion_pytorch_model\.ema\.safetensors or .*variant='fp16'"):
            load_checkpoint(path, variant="ema")


def test_a_variant_beside_the_others(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "fp16", beside=True)
    assert same_weights(load_checkpoint(folder).state_dict(), MODEL)
    assert same_weights(load_checkpoint(folder, variant="fp16").state_dict(), EMA)
    assert same_weights(load_checkpoint(folder / "diffusion_pytorch_model.fp16.safetensors").state_dict(), EMA)


def test_variants_are_of_folders(tmp_path: Path) -> None:
    for content in (MODEL, saved(MODEL, tmp_path / "x.pt")):
        with pytest.raises(CheckpointError, match="variant: got 'fp16', expected a diffusers folder, which has variants"):
            load_checkpoint(content, variant="fp16", config=small())
    for variant in ("../fp16", "", 16):
        with pytest.raises(ValueError, match=r"variant: got .*, expected a name such as 'fp16', or None"):
            load_checkpoint(tmp_path, variant=variant)  # type: ignore[arg-type]


def test_the_variants_that_diffusers_writes(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, num_layers=1, sample_size=8, num_embeds_ada_norm=10, out_channels=8
    ).half()
    for safe in (True, False):
        for size in ("10GB", "100KB"):
            folder = tmp_path / f"{safe}{size}"
            theirs.save_pretrained(folder, variant="fp16", safe_serialization=safe, max_shard_size=size)
            model = load_checkpoint(folder, variant="fp16")
            assert model.config.depth == 1
            assert next(model.parameters()).dtype == torch.float16
