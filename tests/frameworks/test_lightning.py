"""Lightning: fit, checkpoints, resuming, prediction and averaged weights."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from framework_models import (
    EACH_KIND,
    Batch,
    assert_change_as_good_as,
    assert_fast,
    assert_same_change,
    assert_same_losses,
    assert_same_output,
    assert_same_tensors,
    call,
    loss_of,
    optimizer_of,
    pair,
    predict,
    samples,
    train,
    weights_of,
)
from support import error
from torch import Tensor, nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.full,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Denoiser(lightning.LightningModule):
    def __init__(self, kind: str, model: nn.Module):
        super().__init__()
        self.kind = kind
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = loss_of(self.kind, self.model, batch, self.global_step)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        self.log("validation_loss", loss_of(self.kind, self.model, batch))

    def predict_step(self, batch: Batch, index: int) -> Tensor:
        return call(self.kind, self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)


def data(count: int = 8) -> DataLoader[Batch]:
    return DataLoader(samples(count), batch_size=2)


def trainer(folder: Path, **settings: Any) -> Any:
    defaults = dict(accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    return lightning.Trainer(**{**defaults, **quiet, **settings})


@EACH_KIND
def test_fits_like_the_untouched_model(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    before = weights_of(untouched)
    found, expected = Denoiser(kind, fast), Denoiser(kind, untouched)
    for module in (found, expected):
        loop = trainer(tmp_path, gradient_clip_val=0.5, limit_val_batches=1, num_sanity_val_steps=0)
        loop.fit(module, data(), data(2))
    assert_same_losses(found.losses, expected.losses)
    assert_same_change(before, fast, untouched)
    assert_fast(kind, fast, steps=4, predictions=1)


@EACH_KIND
def test_bf16_training_is_as_good_as_untouched(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    exact, before = copy.deepcopy(untouched), weights_of(untouched)
    trainer(tmp_path).fit(Denoiser(kind, exact), data())
    for model in (fast, untouched):
        trainer(tmp_path, precision="bf16-mixed").fit(Denoiser(kind, model), data())
    assert_change_as_good_as(before, fast, exact, untouched)
    assert_fast(kind, fast, steps=4)


@EACH_KIND
def test_resumed_run_has_the_bits_of_the_whole_run(kind: str, tmp_path: Path) -> None:
    """Every epoch is the same batch, since Lightning begins the loader anew."""
    whole, first, resumed = (Denoiser(kind, pair(kind, seed).fast) for seed in (0, 0, 1))
    trainer(tmp_path).fit(whole, data(2))
    saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "half")
    trainer(tmp_path, max_steps=2, callbacks=[saver], enable_checkpointing=True).fit(first, data(2))
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert_same_tensors(saved, {f"model.{name}": value for name, value in first.model.state_dict().items()})
    trainer(tmp_path).fit(resumed, data(2), ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + resumed.losses == whole.losses
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert_fast(kind, resumed.model, steps=2)
    loaded = Denoiser.load_from_checkpoint(tmp_path / "half.ckpt", kind=kind, model=pair(kind, seed=2).untouched)
    assert_same_output(kind, first.model, loaded.model)


@EACH_KIND
def test_predicts_like_the_untouched_model(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    found = trainer(tmp_path).predict(Denoiser(kind, fast), data())
    expected = trainer(tmp_path).predict(Denoiser(kind, untouched), data())
    assert error(torch.cat(found), torch.cat(expected)) <= 1e-5
    assert_fast(kind, fast, predictions=4)


@EACH_KIND
def test_averaged_weights(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    before = weights_of(untouched)
    for model in (fast, untouched):
        averaging = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
        loop = trainer(tmp_path, callbacks=[averaging], limit_val_batches=1, num_sanity_val_steps=0)
        loop.fit(Denoiser(kind, model), data(), data(2))
    assert_same_change(before, fast, untouched)
    assert_same_output(kind, fast, untouched)
    assert_fast(kind, fast, steps=4, predictions=2)


@EACH_KIND
def test_fits_like_a_plain_loop(kind: str, tmp_path: Path) -> None:
    fast, untouched = pair(kind)
    found = Denoiser(kind, fast)
    trainer(tmp_path).fit(found, data())
    assert_same_losses(found.losses, train(kind, untouched, data()))
    assert predict(kind, fast).isfinite().all()
