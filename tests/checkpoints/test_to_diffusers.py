"""``DiT.to_diffusers``: the same numbers in diffusers' class, accelerated, in a pipeline that runs, saves and loads."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import inputs, small, weights_of
from support import error
from tiny_vae import tiny

from ditfast import CheckpointError, DiT, acceleration_report, load_checkpoint, restore

diffusers = pytest.importorskip("diffusers")
CONFIG = small(num_classes=1000, flavour="diffusers")  # 1000 is the pipeline's class for none


def loaded(dtype: torch.dtype = torch.float32, **fields: object) -> DiT:
    config = small(**{"num_classes": 1000, "flavour": "diffusers", **fields})
    return load_checkpoint(weights_of(config, dtype), config=config)


@torch.no_grad()
def called(theirs: Any, model: DiT) -> torch.Tensor:
    x, t, y = inputs(model.config, model.dtype)
    return theirs(x, timestep=t, class_labels=y).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_are_the_models_and_diffusers_own(dtype: torch.dtype) -> None:
    model = loaded(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that diffusers computes otherwise
        theirs = model.to_diffusers()
    assert isinstance(theirs, diffusers.DiTTransformer2DModel)
    assert (theirs.dtype, theirs.device, theirs.training) == (dtype, torch.device("cpu"), False)
    fast = called(theirs, model)
    assert all(row.swapped for row in acceleration_report(theirs).rows)
    assert acceleration_report(theirs).rows[0].fast_calls > 0
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        assert error(fast, model(*inputs(model.config, dtype))) < tolerance
    assert error(fast, called(restore(copy.deepcopy(theirs)), model)) < tolerance
    assert {tensor.device.type for tensor in (*theirs.parameters(), *theirs.buffers())} == {"cpu"}


def test_a_prediction_that_is_lost_is_said() -> None:
    with pytest.warns(UserWarning, match=r"of v: a pipeline that is saved and loaded again means epsilon; .*prediction='v'"):
        loaded(prediction="v").to_diffusers()


def test_weights_are_copied_and_share_nothing() -> None:
    model = loaded()
    theirs = model.to_diffusers()
    before = called(theirs, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(called(theirs, model), before)
    storages = [parameter.untyped_storage().data_ptr() for parameter in theirs.parameters()]
    assert len(set(storages)) == len(storages)
    assert all(parameter.requires_grad for parameter in theirs.parameters())
    assert loaded().train().to_diffusers().training


def test_a_pipeline_runs_saves_and_loads(tmp_path: Path) -> None:
    model = loaded()
    vae = tiny().eval()
    pipeline = diffusers.DiTPipeline(model.to_diffusers(), vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images(of: Any) -> torch.Tensor:
        made = of([1, 7], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
        return torch.from_numpy(made)

    made = images(pipeline)
    assert acceleration_report(pipeline).rows[0].fast_calls == 2
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert error(images(again), made) < 1e-4
    assert load_checkpoint(tmp_path / "pipeline").config == model.config


def test_what_diffusers_computes_otherwise_is_said() -> None:
    with pytest.warns(UserWarning, match="^diffusers computes this model otherwise: timestep frequencies over 127, not 128, "):
        loaded(flavour="official", num_classes=10).to_diffusers()


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"conditioning": "adaln"}, "conditioning: got 'adaln', but diffusers' class has 'adaln_zero' only"),
        ({"input_size": (8, 12)}, r"input_size: got \(8, 12\), but diffusers' class has square grids only"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob: got 0, but diffusers' class always has a row for no class"),
    ],
    ids=["design", "grid", "no null class"],
)
def test_what_diffusers_cannot_hold(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(CheckpointError, match=f"^to_diffusers: {fault}"):
        DiT(small(**fields)).to_diffusers()


def test_diffusers_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"^to_diffusers: .* expected diffusers: pip install diffusers$"):
        DiT(CONFIG).to_diffusers()
