import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from ditfast.cli import main
from ditfast.evaluation import EvaluationError, open_images
from ditfast.images import Pixels, save_npz, save_png

pytest.importorskip("PIL")


def random_pixels(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def png_folder(folder: Path, pixels: Pixels, names: list[str]) -> Path:
    for name, image in zip(names, pixels, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(folder / name, image)
    return folder


def other_png(path: Path, depth: int, colour: int, bytes_a_pixel: int) -> None:
    """A 4x4 PNG of another type than ``save_png`` writes."""
    body = b"".join(b"\0" + bytes(4 * bytes_a_pixel) for _ in range(4))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0)), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + tag + d + struct.pack(">I", zlib.crc32(tag + d)) for tag, d in chunks)
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [2, 5, 100])
def test_folder_in_the_order_of_names(channels: int, batch: int, tmp_path: Path) -> None:
    pixels = random_pixels(5, 4, 6, channels)
    png_folder(tmp_path, pixels, ["c.png", "a.PNG", "e.png", "b.png", "d.png"])
    (tmp_path / "notes.txt").write_text("not an image")
    images = open_images(tmp_path)
    assert (len(images), images.shape, images.labels) == (5, (5, 4, 6, channels), None)
    batches = list(images.batches(batch))
    assert [len(part) for part in batches] == {2: [2, 2, 1], 5: [5], 100: [5]}[batch]
    assert (np.concatenate(batches) == pixels[[1, 3, 0, 4, 2]]).all()


def test_folders_named_by_class_are_labels(tmp_path: Path) -> None:
    pixels = random_pixels(4, 4, 6, 1)
    images = open_images(png_folder(tmp_path / "a", pixels, ["7/x.png", "10/b.png", "10/a.png", "3/x.png"]))
    assert images.labels is not None
    read = zip(images.labels.tolist(), np.concatenate(list(images.batches(3))), strict=True)
    assert all(
        label == expected and (image == pixels[k]).all()
        for (label, image), (expected, k) in zip(read, [(10, 2), (10, 1), (3, 3), (7, 0)], strict=True)
    )
    assert open_images(png_folder(tmp_path / "b", pixels[:2], ["7/x.png", "cat/a.png"])).labels is None


def test_deeper_folders_are_of_the_class_above_them(tmp_path: Path) -> None:
    pixels = random_pixels(4, 4, 6, 1)
    images = open_images(png_folder(tmp_path, pixels, ["7/more/x.png", "10/b.png", "10/a/deep/a.png", "3/x.png"]))
    assert images.labels is not None
    assert images.labels.tolist() == [10, 10, 3, 7]
    assert (np.concatenate(list(images.batches(3))) == pixels[[2, 1, 3, 0]]).all()


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["a.png", "more/b.png", "more/deep/c.png"], "2 images are left out, such as more/b.png"),
        (["a.png", "photo.JPG"], "1 images are left out, such as photo.JPG"),
        (["1/a.png", "1/b.webp", "2/c.jpeg"], "2 images are left out, such as 1/b.webp"),
        (["a.png", "b.tiff", "c.gif"], "2 images are left out, such as b.tiff"),
    ],
    ids=["beside-folders", "other-formats", "other-formats-in-folders", "formats-that-nothing-reads"],
)
def test_images_that_are_left_out_are_named(names: list[str], left_out: str, tmp_path: Path) -> None:
    png_folder(tmp_path, random_pixels(len(names), 4, 6, 1), names)
    with pytest.warns(UserWarning, match=left_out):
        assert len(open_images(tmp_path)) == 1


@pytest.mark.parametrize("name", ["b.png", "7"], ids=["image", "class"])
def test_a_link_to_nothing_is_named(name: str, tmp_path: Path) -> None:
    png_folder(tmp_path, random_pixels(1, 4, 6, 1), ["a.png"])
    (tmp_path / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(EvaluationError, match=rf"/{name}: cannot be read: No such file or directory$"):
        open_images(tmp_path)


@pytest.mark.parametrize("names", [["0.png", "1.png"], ["5/0.png", "6/1.png"]], ids=["flat", "by-class"])
def test_what_systems_leave_behind_is_no_image(names: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pixels = random_pixels(2, 4, 6, 3)
    png_folder(tmp_path, pixels, names)
    inside = Path(names[0]).parent
    behind = [f"._{names[0]}", ".DS_Store", "Thumbs.db", "__MACOSX/._0.png", "@eaDir/0.png", ".trash/2.png"]
    for name in (*behind, inside / "._0.png", inside / ".0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\x05\x16\x07")
    images = open_images(tmp_path)
    assert (np.concatenate(list(images.batches(3))) == pixels).all()
    assert (images.labels is None) == (inside == Path())
    assert not recwarn.list


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_are_upright(orientation: int, tmp_path: Path) -> None:
    from PIL import Image

    mark = Image.Exif()
    mark[0x0112] = orientation
    stored = random_pixels(4, 6, 3)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=mark)
    images = open_images(tmp_path)
    expected = np.rot90(stored, {1: 0, 3: 2, 6: -1}[orientation])
    assert images.shape == (1, *expected.shape)
    (batch,) = images.batches(1)
    assert (batch[0] == expected).all()


def test_a_mark_of_orientation_behind_the_pixels_is_named(tmp_path: Path) -> None:
    from PIL import Image

    mark = Image.Exif()
    mark[0x0112] = 6
    Image.fromarray(random_pixels(4, 6, 3)).save(tmp_path / "a.png", exif=mark)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, end_chunk = content[start:end], content[-12:]
    (tmp_path / "a.png").write_bytes(content[:start] + content[end:-12] + chunk + end_chunk)
    with pytest.raises(EvaluationError, match=r"a\.png: 4x6 pixels when turned upright, expected 6x4"):
        list(open_images(tmp_path).batches(1))


@pytest.mark.parametrize("count", [["--per-class", "3", "--classes", "7", "2"], ["--num", "7"]], ids=["per-class", "num"])
def test_a_run_of_sample_knows_its_labels(count: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["sample", "--out", str(out), "--steps", "ddim2", "--npz", "--seed", "5", *count]) == 0
    folder, npz = open_images(out), open_images(out / "samples.npz")
    assert folder.labels is not None
    assert npz.labels is not None
    assert folder.labels.tolist() == npz.labels.tolist()
    assert len(set(folder.labels)) > 1
    assert all((a == b).all() for a, b in zip(folder.batches(4), npz.batches(4), strict=True))
    (out / "000001.png").unlink()
    with pytest.raises(EvaluationError, match=r"out: \d of the \d images of its run.json; expected a finished run"):
        open_images(out)


def test_npz_is_read_in_batches(tmp_path: Path) -> None:
    pixels = random_pixels(5, 4, 6, 3)
    save_npz(tmp_path / "stored.npz", pixels, [1, 2, 3, 4, 5])
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=pixels)
    for name, labels in (("stored.npz", [1, 2, 3, 4, 5]), ("compressed.npz", None)):
        images = open_images(tmp_path / name)
        assert images.shape == (5, 4, 6, 3)
        assert (None if images.labels is None else images.labels.tolist()) == labels
        batches = list(images.batches(2))
        assert [len(part) for part in batches] == [2, 2, 1]
        assert (np.concatenate(batches) == pixels).all()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({}, "no PNG files"),
        ({"a.png": (4, 6, 1), "b.png": (6, 4, 1)}, "b.png: 4x6 grey, but {path}/a.png is 6x4 grey; expected one size"),
        ({"a.png": (4, 6, 1), "b.png": (4, 6, 3)}, "b.png: 6x4 RGB, but {path}/a.png is 6x4 grey"),
        ({"a.png": (8, 6)}, "a.png: RGBA pixels, expected 8-bit grey (L) or RGB"),
        ({"a.png": (16, 0)}, "a.png: I;16 pixels, expected 8-bit grey (L) or RGB"),
        ({"a.png": b"GIF89a"}, "a.png: not a readable PNG file"),
        ({"a.png": b""}, "a.png: not a readable PNG file"),
    ],
)
def test_folders_that_cannot_be_read(content: dict[str, bytes | tuple[int, ...]], fault: str, tmp_path: Path) -> None:
    for name, value in content.items():
        if isinstance(value, bytes):
            (tmp_path / name).write_bytes(value)
        elif len(value) == 3:
            save_png(tmp_path / name, random_pixels(*value))
        else:
            other_png(tmp_path / name, *value, bytes_a_pixel={(8, 6): 4, (16, 0): 2}[value])
    with pytest.raises(EvaluationError) as caught:
        open_images(tmp_path)
    assert fault.format(path=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_named_when_it_is_read(tmp_path: Path) -> None:
    png_folder(tmp_path, random_pixels(3, 40, 40, 1), ["a.png", "b.png", "c.png"])
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:700])
    images = open_images(tmp_path).batches(1)
    next(images)
    with pytest.raises(EvaluationError, match=r"b\.png: not a readable PNG file"):
        next(images)


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "got the arrays images, expected arr_0, uint8 [N, H, W, 3]"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "arr_0 is float64 [2, 4, 4, 3], expected uint8"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "arr_0 is uint8 [2, 4, 4], expected"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "arr_0 is uint8 [2, 3, 4, 4], expected"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8, order="F")}, "Fortran order"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "arr_0 has no images"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, "arr_1 is int64 [3], expected"),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)},
            "arr_1 is float64 [2], expected integer labels [2]",
        ),
        ({"arr_0": np.array([None])}, "arr_0 is object [1], expected"),
    ],
)
def test_npz_files_that_do_not_fit(arrays: dict[str, np.ndarray], fault: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(EvaluationError) as caught:
        open_images(tmp_path / "a.npz")
    assert str(caught.value).startswith(f"{tmp_path / 'a.npz'}: ")
    assert fault in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.npz", b"PK"), ("a.npz", None), ("a.txt", b"hello"), ("missing", None)])
def test_files_that_are_something_else(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=r"not a readable .npz file|expected a folder of PNG files or an .npz file"):
        open_images(tmp_path / name)


def test_a_damaged_npz_is_named_when_it_is_read(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", random_pixels(40, 8, 8, 3), [0] * 40)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"a\.npz: not a readable .npz file"):
        list(open_images(tmp_path / "a.npz").batches(100))
