"""Folders of images: what is found in them, what becomes of an image, what is refused."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vae import tiny
from torch import Tensor

from ditfast.images import Pixels
from ditfast.training.data import BadRecord, Data, DataError, ImageFolder, open_data
from ditfast.training.data.images import read_image
from ditfast.vae import VAEError, draw_latents, encode_moments, scaling

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
SIZE = 16


def random_pixels(height: int = SIZE, width: int = SIZE, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def written(path: Path, pixels: Pixels | None = None, mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_pixels() if pixels is None else pixels).convert(mode).save(path, **options)
    return path


def photographs(folder: Path) -> Path:
    for seed, name in enumerate(("cat/b.png", "cat/a.png", "ant/z.png", "dog/c.png")):
        written(folder / name, random_pixels(seed=seed))
    return folder


def opened(path: Path, **options: Any) -> Data:
    return open_data(str(path), image_size=SIZE, **options)


def unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ what is found
def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = photographs(tmp_path)
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    data = opened(folder)
    assert isinstance(data, ImageFolder)
    assert data.names == ["ant/z.png", "cat/a.png", "cat/b.png", "dog/c.png"]
    assert [data[k].label for k in range(len(data))] == [0, 1, 1, 2]
    assert (data.num_classes, data.input_shape) == (3, (3, SIZE, SIZE))
    assert (data[1].values.permute(1, 2, 0).numpy() == random_pixels(seed=1)).all()


def test_images_in_folders_within_a_class_are_of_that_class(tmp_path: Path) -> None:
    for seed, name in enumerate(("cat/b.png", "cat/a/2.png", "cat/a/deep/1.png", "ant/only/here.png", "dog/c.png")):
        written(tmp_path / name, random_pixels(seed=seed))
    with pytest.warns(UserWarning, match=r"^data: .*: 3 images lie in folders within a class's folder, such as ant/only/here"):
        data = opened(tmp_path)
    assert isinstance(data, ImageFolder)
    assert data.names == ["ant/only/here.png", "cat/a/2.png", "cat/a/deep/1.png", "cat/b.png", "dog/c.png"]
    assert [data[k].label for k in range(len(data))] == [0, 1, 1, 1, 2]
    assert (data[2].values.permute(1, 2, 0).numpy() == random_pixels(seed=2)).all()


def test_a_folder_that_leads_into_itself_is_read_once(tmp_path: Path) -> None:
    written(tmp_path / "data" / "cat" / "1.png")
    written(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="1 images lie in"):
        data = opened(tmp_path / "data")
    assert isinstance(data, ImageFolder)
    assert data.names == ["cat/1.png", "cat/linked/2.png"]


def test_images_of_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/b.TIF", "dog/c.png", "dog/d.avif", "dog/notes.txt"):
        written(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_bytes(b"II*\0")
    with pytest.warns(UserWarning, match=r"^data: .*: 2 images are left out, such as cat/b\.TIF; expected \.bmp, "):
        data = opened(tmp_path)
    assert isinstance(data, ImageFolder)
    assert data.names == ["cat/a.png", "dog/c.png"]


@pytest.mark.parametrize("name", ["cat/2.png", "dog"], ids=["image", "class"])
def test_a_link_to_nothing_is_named(name: str, tmp_path: Path) -> None:
    """Left out, a class would shift the numbers of those behind it."""
    written(tmp_path / "cat" / "1.png")
    written(tmp_path / "eel" / "1.png")
    (tmp_path / name).symlink_to(tmp_path / "unmounted" / name)
    with pytest.raises(DataError, match=rf"^data: .*/{name}: cannot be read: No such file or directory$"):
        opened(tmp_path)


def test_a_plain_folder_is_told_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    opened(photographs(tmp_path))
    assert not recwarn.list


LEFT_BEHIND = (
    *("._cat", ".DS_Store", "cat/._a.png", "cat/.hidden.png", "cat/.hidden/x.png", "cat/Thumbs.db", "Thumbs.db", "desktop.ini"),
    *("__MACOSX/cat/._a.png", "@eaDir/a.png/small.jpg", "$RECYCLE.BIN/S-1-5/old.png", "lost+found/x.png"),
)


def test_what_systems_leave_behind_is_no_image_and_no_class(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = photographs(tmp_path)
    fingerprint = opened(folder).fingerprint
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\x05\x16\x07")
    assert opened(folder).fingerprint == fingerprint
    assert not recwarn.list


def test_images_of_a_flat_folder_are_of_one_class(tmp_path: Path) -> None:
    for name in ("b.JPEG", "a.jpg", "c.webp"):
        written(tmp_path / name)
    data = opened(tmp_path)
    assert [data[k].label for k in range(3)] == [0, 0, 0]
    assert data.num_classes == 1


def test_the_fingerprint_is_of_what_decides_the_latents(tmp_path: Path) -> None:
    folder = photographs(tmp_path)
    fingerprints = [opened(folder).fingerprint, open_data(str(folder), image_size=8).fingerprint]
    fingerprints += [opened(folder, vae=vae).fingerprint for vae in (tiny(), tiny(scaling_factor=0.5))]
    (folder / "dog" / "c.png").rename(folder / "dog" / "d.png")
    fingerprints.append(opened(folder).fingerprint)
    written(folder / "dog" / "d.png", random_pixels(4, 4))
    fingerprints.append(opened(folder).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)
    assert opened(folder).fingerprint == fingerprints[-1]


# ------------------------------------------------------------------------------------------------ what an image becomes
@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (SIZE, 21), (30, SIZE)])
def test_the_middle_of_an_image_is_cut_out(height: int, width: int, tmp_path: Path) -> None:
    pixels = random_pixels(height, width)
    found = read_image(written(tmp_path / "a.png", pixels), SIZE)
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    assert (found.permute(1, 2, 0).numpy() == pixels[top : top + SIZE, left : left + SIZE]).all()
    assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)


def test_a_power_of_two_is_averaged_away(tmp_path: Path) -> None:
    pixels = random_pixels(4 * SIZE, 4 * SIZE)
    found = read_image(written(tmp_path / "a.png", pixels), SIZE)
    means = pixels.reshape(SIZE, 4, SIZE, 4, 3).mean((1, 3))
    assert np.abs(found.permute(1, 2, 0).numpy() - means).max() <= 0.5


@pytest.mark.parametrize("size", [5, 40, 100], ids=["enlarged", "smaller by less than two", "smaller by more"])
def test_other_sizes_keep_the_picture(size: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, size)
    pixels = np.broadcast_to(ramp[None, :, None], (size, size, 3)).astype(np.uint8)
    found = read_image(written(tmp_path / "a.png", pixels), SIZE)[0].float()
    expected = torch.nn.functional.interpolate(torch.tensor(ramp)[None, None], SIZE, mode="linear", antialias=False)[0, 0]
    assert (found - expected).abs().max() <= 12
    assert (found[0] == found).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_photograph_is_seen_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    ramps = np.stack(np.meshgrid(np.arange(0, 240, 10), np.arange(0, 160, 10), indexing="ij"), -1)  # [24, 16, 2]
    pixels = np.concatenate([ramps, ramps[..., :1] // 2 + ramps[..., 1:] // 2], -1).astype(np.uint8)  # [24, 16, 3]
    mark = Image.Exif()
    mark[0x0112] = orientation
    path = written(tmp_path / f"a.{suffix}", pixels, exif=mark, quality=95)
    with Image.open(path) as image:
        viewed = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    top, left = (viewed.shape[0] - SIZE) // 2, (viewed.shape[1] - SIZE) // 2
    expected = viewed[top : top + SIZE, left : left + SIZE]
    assert (read_image(path, SIZE).permute(1, 2, 0).numpy() == expected).all()


def test_a_damaged_mark_of_orientation_is_passed_over(tmp_path: Path) -> None:
    pixels = random_pixels()
    for exif in (b"Exif\0\0no TIFF", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"):
        assert (read_image(written(tmp_path / "a.png", pixels, exif=exif), SIZE).permute(1, 2, 0).numpy() == pixels).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_any_eight_bit_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", mode=mode)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.array(image.convert("RGB"))
    assert (read_image(path, SIZE).permute(1, 2, 0).numpy() == expected).all()


def test_the_suffix_does_not_decide_the_format(tmp_path: Path) -> None:
    written(tmp_path / "a.png").rename(tmp_path / "a.jpeg")
    assert (read_image(tmp_path / "a.jpeg", SIZE).permute(1, 2, 0).numpy() == random_pixels()).all()


# ------------------------------------------------------------------------------------------------ clean
def test_pixels_are_mirrored_and_scaled(tmp_path: Path) -> None:
    data = opened(photographs(tmp_path))
    values = torch.stack([data[k].values for k in range(3)])
    found = data.clean(values, torch.tensor([False, True, False]), torch.randn(3, 3, SIZE, SIZE))
    assert torch.equal(found[0], unit(values[0]))
    assert torch.equal(found[1], unit(values[1]).flip(-1))
    assert found.dtype == torch.float32


def test_images_are_mirrored_then_encoded(tmp_path: Path) -> None:
    vae = tiny(scaling_factor=0.5).eval()
    data = opened(photographs(tmp_path), vae=vae)
    assert data.input_shape == (4, 8, 8)
    values, noise = torch.stack([data[k].values for k in range(2)]), torch.randn(2, 4, 8, 8)
    found = data.clean(values, torch.tensor([False, True]), noise)
    images = torch.stack([unit(values[0]), unit(values[1]).flip(-1)])
    expected = draw_latents(encode_moments(vae, images), noise, **scaling(vae))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, data.clean(values, torch.tensor([False, True]), -noise), atol=1e-2)


def test_another_process_gets_no_vae(tmp_path: Path) -> None:
    data = pickle.loads(pickle.dumps(opened(photographs(tmp_path), vae=tiny())))
    assert data.vae is None
    assert data[0].values.shape == (3, SIZE, SIZE)


# ------------------------------------------------------------------------------------------------ errors
def test_a_broken_image_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jpg", random_pixels(64, 64))
    whole = path.read_bytes()
    for content in (b"", b"no image\nat all", whole[: len(whole) // 2], bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(BadRecord, match=r"a\.jpg: not a readable image: ") as caught:
            opened(tmp_path)[0]
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(BadRecord, match=r"a\.jpg: not a readable image: .*No such file"):
        read_image(path, SIZE)


def test_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(BadRecord, match=r"a\.png: I;16 pixels, expected 8 bits a channel"):
        opened(tmp_path)[0]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data: .*/none: nothing there, expected a folder of images or of latents, or digits"):
        opened(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data: .*/file: a file, expected"):
        opened(tmp_path / "file")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no images .*, expected some, or folders of them, one a class"):
        opened(tmp_path)


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    (photographs(tmp_path) / "bee").mkdir()
    with pytest.raises(DataError, match=r"bee: no images .*, expected some of this class"):
        opened(tmp_path)


def test_images_beside_classes_are_refused(tmp_path: Path) -> None:
    written(photographs(tmp_path) / "a.png")
    with pytest.raises(DataError, match=r"holds the image a\.png beside the folder ant, expected one or the other"):
        opened(tmp_path)


def test_a_size_that_makes_no_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VAEError, match="encodes multiples of 2 pixels, got 7"):
        open_data(str(photographs(tmp_path)), image_size=7, vae=tiny())


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"Pillow, which is not installed: pip install 'ditfast\[train\]'"):
        opened(tmp_path)
