"""Saved arguments, however a training script writes them, tell the number of heads, or are named where they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import small, weights_of
from safetensors.torch import save_file

from ditfast import CheckpointError, load_checkpoint

CONFIG = small(hidden_size=384, num_heads=12)  # the paper's width with 6 heads
WRITTEN = {
    "beside the weights": {"num_heads": 12},
    "string": {"args": {"num_heads": "12"}},
    "float": {"args": {"num_heads": 12.0}},
    "tensor": {"args": {"num_heads": torch.tensor(12)}},
    "JSON": {"config": json.dumps({"model": {"num_heads": 12}})},
    "upper case": {"cfg": {"MODEL": {"NUM_HEADS": 12}}},
    "hyphens": {"args": {"num-heads": 12}},
    "nhead": {"hparams": {"nhead": 12}},
    "num_attn_heads": {"model_cfg": {"num_attn_heads": 12}},
    "options": {"options": {"num_heads": 12}},
    "width of a head": {"args": {"head_dim": 32}},
    "diffusers' width of a head": {"config": {"attention_head_dim": 32}},
}


@pytest.mark.parametrize("written", WRITTEN)
def test_heads_are_read_as_they_are_written(written: str) -> None:
    assert load_checkpoint({"ema": weights_of(CONFIG), **WRITTEN[written]}).config == CONFIG


@pytest.mark.parametrize("metadata", [{"num_heads": "12"}, {"config": '{"num_heads": 12}'}], ids=["number", "JSON"])
def test_heads_in_the_metadata_of_safetensors(metadata: dict[str, str], tmp_path: Path) -> None:
    save_file(weights_of(CONFIG), tmp_path / "x.safetensors", metadata=metadata)
    assert load_checkpoint(tmp_path / "x.safetensors").config == CONFIG


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("${heads}", r"'\${heads}'"),
        ("twelve", "'twelve'"),
        (12.5, "12.5"),
        (10**5000, "an int of 16610 bits"),
        (np.int64(12), "a numpy.*scalar"),
    ],
    ids=["interpolation", "word", "fraction", "5000 digits", "NumPy"],
)
def test_heads_that_cannot_be_read_are_asked_for(value: object, told: str, tmp_path: Path) -> None:
    torch.save({"ema": weights_of(CONFIG), "args": {"num_heads": value}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"num_heads: the saved arguments say {told}, .*; give config=DiTConfig\("):
        load_checkpoint(tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt", config=CONFIG).config == CONFIG
