"""Latents extracted from a folder of images, and trained on: what a shard holds, what is damaged, what is refused."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from extraction import SIZE, extracted, photographs
from safetensors.torch import load_file, save_file
from tiny_vae import tiny
from torch import Tensor

from ditfast.training.data import BadRecord, DataError, ImageFolder, Latents, Stream, open_data
from ditfast.vae import encode_moments


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Latents of 7 images in shards of 3."""
    photographs(tmp_path / "photographs")
    return extracted(tmp_path)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drawn(latents: Latents, flips: Tensor, noise: Tensor) -> Tensor:
    return latents.clean(torch.stack([latents[k].values for k in range(len(latents))]), flips, noise)


# ------------------------------------------------------------------------------------------------ what is there
def test_latents_are_those_of_the_images(folder: Path) -> None:
    vae = tiny(scaling_factor=0.5, shift_factor=0.25).eval()
    latents = open_data(str(folder), vae=vae)
    images = open_data(str(folder.parent / "photographs"), image_size=SIZE, vae=vae)
    assert isinstance(latents, Latents)
    assert isinstance(images, ImageFolder)
    assert (len(latents), latents.input_shape, latents.num_classes) == (7, images.input_shape, images.num_classes)
    assert [latents[k].label for k in range(7)] == images.labels
    flips, noise = torch.arange(7) % 2 == 0, torch.randn(7, 4, 8, 8)
    found = drawn(latents, flips, noise)
    expected = images.clean(torch.stack([images[k].values for k in range(7)]), flips, noise)
    assert (found.shape, found.dtype) == ((7, 4, 8, 8), torch.float32)
    assert (found - expected).abs().max() <= 2**-11 * expected.abs().max() * 2
    assert (found - drawn(latents, ~flips, noise)).abs().amin() > 0


def test_latents_are_drawn_from_mean_and_deviation(folder: Path) -> None:
    latents = Latents(folder)
    zeros, flips = torch.zeros(7, 4, 8, 8), torch.zeros(7, dtype=torch.bool)
    mean, std = (moment.float() for moment in latents[2].values[0].chunk(2))
    assert torch.allclose(drawn(latents, flips, zeros)[2], (mean - 0.25) * 0.5)
    assert torch.allclose(drawn(latents, flips, zeros + 2)[2], (mean + 2 * std - 0.25) * 0.5)


def test_moments_of_both_are_stored_in_fp16(folder: Path) -> None:
    latents, images = Latents(folder), ImageFolder(folder.parent / "photographs", SIZE)
    both = torch.stack([images[4].values, images[4].values.flip(-1)]) / 127.5 - 1
    expected = encode_moments(tiny().eval(), both)
    assert latents[4].values.dtype == torch.float16
    assert torch.allclose(latents[4].values.float(), expected, rtol=2**-10, atol=1e-5)


def test_another_process_opens_the_same(folder: Path) -> None:
    latents = Latents(folder)
    again = pickle.loads(pickle.dumps(latents))
    assert again.fingerprint == latents.fingerprint
    assert torch.equal(again[6].values, latents[6].values)
    alone, several = (list(islice(Stream(latents, 0, 4, workers=workers), 3)) for workers in (0, 2))
    assert all(torch.equal(a.values, b.values) for a, b in zip(alone, several, strict=True))


def test_the_fingerprint_is_of_what_decides_the_latents(folder: Path) -> None:
    before = Latents(folder).fingerprint
    assert Latents(folder.rename(folder.with_name("moved"))).fingerprint == before
    index = folder.with_name("moved") / "index.json"
    index.write_text(index.read_text().replace('"files": "', '"files": "f'))
    assert Latents(index.parent).fingerprint != before


# ------------------------------------------------------------------------------------------------ unreadable records
def test_a_flipped_bit_is_a_bad_record(folder: Path) -> None:
    path = shards(folder)[1]
    content = bytearray(path.read_bytes())
    moments = load_file(path)["moments"]
    content[content.index(moments[2, 1].contiguous().numpy().tobytes()) + 5] ^= 4
    path.write_bytes(content)
    latents = Latents(folder)
    with pytest.raises(BadRecord, match=rf"^{path}: record 2 \(.*\.png\): its bits have changed since it was written$"):
        latents[5]
    assert latents[4].values.shape == latents[6].values.shape
    with warnings.catch_warnings(record=True) as caught:
        batch = next(iter(Stream(latents, 0, 7, max_bad_records=1)))
    assert (sorted(batch.indices), len(caught)) == ([0, 1, 2, 3, 4, 6, 6], 1)


def test_an_image_that_was_unreadable_is_a_bad_record(tmp_path: Path) -> None:
    names = photographs(tmp_path / "photographs")
    names[1].write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"^unreadable image: {names[1]}: not a readable image: "):
        folder = extracted(tmp_path)
    latents = Latents(folder)
    assert latents.unreadable == 1
    name = f"{names[1].parent.name}/{names[1].name}"
    with pytest.raises(BadRecord, match=rf"record 1 \({name}\): its image could not be read when latents were extracted"):
        latents[1]
    assert latents[0].label == 0
    with warnings.catch_warnings(record=True) as caught:
        batch = next(iter(Stream(latents, 0, 7, max_bad_records=1)))
    assert (sorted(batch.indices), len(caught)) == ([0, 2, 2, 3, 4, 5, 6], 1)


def test_latents_of_no_image_are_refused(tmp_path: Path) -> None:
    for path in photographs(tmp_path / "photographs"):
        path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = extracted(tmp_path)
    with pytest.raises(DataError, match="none of the 7 images could be read when latents were extracted"):
        Latents(folder)


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["nothing", "4 bytes", "100 bytes", "all but a byte"])
def test_a_truncated_shard_is_refused(kept: int, folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"^data: {path}: ") as caught:
        open_data(str(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_refused(folder: Path) -> None:
    shards(folder)[2].unlink()
    expected = r"1 of 3 shards are not there, such as 000002\.safetensors; the same ditfast extract-latents command makes them"
    with pytest.raises(DataError, match=expected):
        open_data(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("labels"), "labels"),
        (lambda tensors: tensors.update(moments=tensors["moments"].float()), r"moments F32 \[3, .*\], expected F16 \[3, "),
        (lambda tensors: tensors.update(moments=tensors["moments"][:, :1].contiguous()), r"moments F16 \[3, 1, .*\], expected"),
        (lambda tensors: tensors.update({name: part[:2] for name, part in tensors.items()}), "2 images, expected 3"),
    ],
    ids=["no labels", "another dtype", "one flip", "fewer images"],
)
def test_a_shard_of_something_else_is_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    path = shards(folder)[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(DataError, match=f"^data: {path}: .*{message}"):
        open_data(str(folder))


@pytest.mark.parametrize("content", ["", "{}", '{"settings": {"images": 7}}', '{"settings": [1]}', "[]"])
def test_a_torn_index_is_refused(content: str, folder: Path) -> None:
    (folder / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json: does not hold what ditfast extract-latents writes"):
        open_data(str(folder))


def test_latents_of_another_vae_are_refused(folder: Path) -> None:
    vae = tiny()
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1
    with pytest.raises(DataError, match="latents of another VAE than the one given"):
        open_data(str(folder), vae=vae)
