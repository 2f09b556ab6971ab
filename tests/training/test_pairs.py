"""A map-style dataset of (x, y) is data for the Trainer, and what is no such dataset is named."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import randomize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import ditfast
from ditfast import DiT, DiTConfig
from ditfast.training import DataError, RunError, RunOptions, Trainer, TrainingStopped, TrainSettings
from ditfast.training.data import Pairs, Record, as_data

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2, input_size=4, in_channels=1, num_classes=3)
SETTINGS = TrainSettings(steps=6, batch=4, rate=1e-2, ema=(0.5,))
COUNT = 20


def images() -> Tensor:
    return torch.randn(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def labels() -> list[int]:
    return [k % 3 for k in range(COUNT)]


class OwnDataset(Dataset[tuple[Tensor, int]]):
    """Pairs, of which some cannot be read."""

    def __init__(self, bad: tuple[int, ...] = (), read: Callable[[Tensor], Any] = lambda x: x):
        self.bad, self.read = bad, read

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.bad:
            raise OSError(f"no file of {index}\nand more lines")
        return self.read(images()[index]), labels()[index]


def in_memory() -> list[tuple[Tensor, int]]:
    return list(zip(images(), labels(), strict=True))


def train(data: Any, out: Path, resume: bool = False, **options: Any) -> Trainer:
    torch.manual_seed(0)
    on_step = options.pop("on_step", lambda *_: None)
    trainer = Trainer(randomize(DiT(CONFIG)), data, SETTINGS, out, RunOptions(save_every=2, **options), on_step=on_step)
    trainer.run(resume)
    return trainer


def weights(out: Path) -> dict[str, Tensor]:
    return ditfast.load_checkpoint(out / "model.safetensors").state_dict()


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


KINDS: dict[str, Callable[[], Any]] = {
    "list": in_memory,
    "TensorDataset": lambda: TensorDataset(images(), torch.tensor(labels())),
    "Dataset": OwnDataset,
    "Subset": lambda: Subset(OwnDataset(), range(COUNT)),
    "lists in a tuple": lambda: tuple([x, np.int64(y)] for x, y in in_memory()),
    "float64": lambda: [(x.double(), y) for x, y in in_memory()],
    "needs gradients": lambda: [(x.clone().requires_grad_(), y) for x, y in in_memory()],
}


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_of_the_same_pairs_train_the_same_weights(kind: str, tmp_path: Path) -> None:
    class AsData(OwnDataset):
        """The same, as ``ditfast.training.Data``."""

        input_shape, num_classes, fingerprint = (1, 4, 4), 3, "own"

        def __getitem__(self, index: int) -> Record:
            return Record(*super().__getitem__(index))

        def clean(self, values: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
            return values

    train(AsData(), tmp_path / "own")
    train(KINDS[kind](), tmp_path / "pairs", evaluate_every=6)
    assert same(tmp_path / "pairs", tmp_path / "own")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_same_to_the_bit(workers: int, tmp_path: Path) -> None:
    def stop(report: object, done: int, speed: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    train(OwnDataset(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(OwnDataset(), tmp_path / "killed", workers=workers, on_step=stop)
    train(OwnDataset(), tmp_path / "killed", resume=True, workers=workers)
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_records(tmp_path: Path) -> None:
    train(in_memory(), tmp_path / "run")
    other = in_memory()
    other[0] = (other[0][0] * 2, other[0][1])
    for data in (other, in_memory()[:-1], [(x, 0) for x, _ in in_memory()]):
        with pytest.raises(RunError, match="data: was "):
            train(data, tmp_path / "run", resume=True)


def test_random_transforms_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    def noisy() -> OwnDataset:
        return OwnDataset(read=lambda x: x + torch.rand(()))

    trainer = train(noisy(), tmp_path / "run")
    assert "drawn anew" in json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["data"]
    assert trainer.data.fingerprint == as_data(noisy(), 3).fingerprint
    train(noisy(), tmp_path / "run", resume=True)


@pytest.mark.parametrize("images_too", [False, True])
def test_labels_drawn_anew_do_not_change_the_fingerprint(images_too: bool) -> None:
    class Anew(OwnDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            x, _ = super().__getitem__(index)
            return x + torch.rand(()) * images_too, int(torch.randint(3, ()))

    first = as_data(Anew(), 3).fingerprint
    torch.rand(7)
    assert as_data(Anew(), 3).fingerprint == first
    assert "labels are drawn anew" in first


def test_looking_at_a_dataset_draws_nothing() -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002 (the global one)

    def seeded() -> None:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)

    seeded()
    expected = draws()
    seeded()
    as_data(OwnDataset(read=lambda x: x + sum(draws())), 3)
    assert draws() == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_records_are_named_and_replaced(workers: int, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="unreadable record, its neighbour takes its place: record 7: OSError: no file of 7$"):
        train(OwnDataset(bad=(7,)), tmp_path / "run", workers=workers, max_bad_records=1)
    with (
        pytest.raises(DataError, match=r"^data: 2 unreadable records, more than the 1 allowed; the last: record \d+: OSError"),
        pytest.warns(UserWarning, match="unreadable record"),
    ):
        train(OwnDataset(bad=(1, 2, 3, 4, 5, 6)), tmp_path / "bad", workers=workers, max_bad_records=1)


def test_a_record_unlike_the_others_is_unreadable() -> None:
    pairs = in_memory()
    data = as_data(pairs, 3)
    for wrong, message in (
        ((torch.zeros(1, 8, 8), 0), r"record 5 whose x is of shape \(1, 8, 8\), expected \(1, 4, 4\)"),
        ((torch.zeros(1, 4, 4), 3), r"record 5 whose y is 3, expected an integer 0\.\.2"),
        (None, r"record 5 that is None, expected a pair \(x, y\)"),
    ):
        pairs[5] = wrong  # type: ignore[call-overload]
        with pytest.raises(ValueError, match=f"^{message}"):
            data[5]


def test_classes_are_the_datasets_or_else_the_models() -> None:
    data = OwnDataset()
    assert as_data(data, 3).num_classes == 3
    data.classes = ["a", "b", "c", "d", "e"]  # type: ignore[attr-defined]
    assert as_data(data, 3).num_classes == 5
    with pytest.raises(RunError, match=r"^data: got 5 classes, but the model has 3"):
        Trainer(DiT(CONFIG), data, SETTINGS, "nowhere")
    data.num_classes = 4  # type: ignore[attr-defined]
    assert as_data(data, 3).num_classes == 4
    data.num_classes = np.int64(6)  # type: ignore[attr-defined]
    assert as_data(data, 3).num_classes == 6
    for wrong in (True, 0, 2.5):
        data.num_classes = wrong  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"^data\.num_classes: got "):
            as_data(data, 3)


class Streamed(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(in_memory())


class Halfway(OwnDataset):
    input_shape = (1, 4, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Streamed(), "a Streamed, an IterableDataset, whose records have no numbers"),
        (DataLoader(OwnDataset()), r"a DataLoader, expected the dataset that it loads: its \.dataset"),
        (images(), r"a tensor \[20, 1, 4, 4\] of torch.float32, expected ditfast.training.Data, .*or a map-style dataset"),
        ({"x": images(), "y": labels()}, "a dict, expected ditfast.training.Data"),
        (iter(in_memory()), "a list_iterator, expected ditfast.training.Data"),
        (Halfway(), "a Halfway with input_shape but without num_classes, fingerprint, clean"),
    ],
    ids=["IterableDataset", "DataLoader", "tensor", "dict of tensors", "iterator", "half of Data"],
)
def test_what_is_no_dataset_of_pairs_is_refused(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^data: got {message}"):
        Trainer(DiT(CONFIG), data, SETTINGS, "nowhere")


class Picture:
    """As Pillow's."""


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": 1, "label": 2}, "that is a dict of image, label, expected a pair (x, y)"),
        ((torch.zeros(1, 4, 4), 1, "name"), "that is a tuple of length 3, expected a pair (x, y)"),
        (
            (Picture(), 1),
            "whose x is a Picture, expected a tensor [C, H, W] of floats: a transform such as torchvision's ToTensor",
        ),
        (
            (np.zeros((1, 4, 4)), 1),
            "whose x is a NumPy array [1, 4, 4] of float64, expected a tensor [C, H, W] of floats: torch.",
        ),
        (
            (torch.zeros(1, 4, 4, dtype=torch.uint8), 1),
            "whose x is a tensor [1, 4, 4] of torch.uint8, expected floats of about",
        ),
        ((torch.zeros(4, 4), 1), "whose x is of shape (4, 4), expected [C, H, W]"),
        ((torch.zeros(1, 4, 4, device="meta"), 1), "whose x is on meta, expected the CPU"),
        ((torch.zeros(1, 4, 4), 3), "whose y is 3, expected an integer 0..2"),
        ((torch.zeros(1, 4, 4), -1), "whose y is -1, expected an integer 0..2"),
        ((torch.zeros(1, 4, 4), 1.0), "whose y is 1.0, expected an integer 0..2"),
        ((torch.zeros(1, 4, 4), torch.eye(3)[0]), "whose y is a tensor [3] of torch.float32, expected an integer 0..2"),
    ],
    ids=["dict", "triple", "PIL", "NumPy", "uint8", "2-d", "meta", "label", "negative", "fraction", "one-hot"],
)
def test_a_record_that_is_no_pair_is_refused_before_the_first_step(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{re.escape('data: got record 0 ' + message)}"):
        Trainer(DiT(CONFIG), [record] * 8, SETTINGS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: got a dataset without records"),
        (
            [(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 4, 6), 0)],
            r"data: got records of the shapes \(1, 4, 4\) and \(1, 4, 6\)",
        ),
        (OwnDataset(bad=tuple(range(COUNT))), "data: got records that cannot be read, all of the 16 tried: record 0: OSError"),
        ([(torch.zeros(3, 4, 4), 0)] * 8, r"data: got latents \(3, 4, 4\), but the model takes \(1, 4, 4\)"),
        (in_memory()[:3], "batch: got 4, expected at most the 3 records of the data"),
    ],
    ids=["empty", "two shapes", "unreadable", "another shape than the model's", "fewer than a batch"],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused(data: Any, message: str) -> None:
    with pytest.raises((DataError, RunError), match=f"^{message}"):
        Trainer(DiT(CONFIG), data, SETTINGS, "nowhere")


def test_a_dataset_of_nan_stops_the_run_by_its_records(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_skipped=1)
    data = [(torch.full((1, 4, 4), torch.nan), 0)] * 8
    with pytest.raises(TrainingStopped, match="of the records"):
        Trainer(DiT(CONFIG), data, settings, tmp_path / "run").run()


def test_pairs_are_never_mirrored() -> None:
    values = images()
    assert torch.equal(Pairs(in_memory(), 3).clean(values, torch.ones(COUNT, dtype=torch.bool), values), values)
