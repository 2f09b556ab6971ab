import io
from pathlib import Path

import numpy as np
import pytest
import torch
from support import raises_naming

from ditfast.images import from_pixels, labelled_grid, save_npz, save_png, to_pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_read_back_by_others(tmp_path: Path, channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, channels)).astype(np.uint8)
    save_png(tmp_path / "image.png", pixels)
    read = np.asarray(image.open(io.BytesIO((tmp_path / "image.png").read_bytes())))
    assert np.array_equal(read.reshape(pixels.shape), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_pixels_cover_the_range() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 5.0]).view(1, 1, 1, 5)
    assert to_pixels(values).flatten().tolist() == [0, 0, 128, 255, 255]
    assert "1 or 3 channels" in raises_naming("images", lambda: to_pixels(torch.zeros(1, 4, 8, 8)))


def test_pixels_come_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 8, 32, 1).repeat(3, axis=3)
    pixels[..., 1] //= 2
    images = from_pixels(pixels)
    assert images.shape == (1, 3, 8, 32)
    assert (images.min(), images.max()) == (-1, 1)
    assert np.array_equal(to_pixels(images), pixels)


def test_grid_has_a_labelled_row_for_each_class() -> None:
    white, black = torch.ones(3, 1, 8, 8), -torch.ones(3, 1, 8, 8)
    grid = labelled_grid({1: white, 17: black}, scale=4, gap=2)
    height = (grid.shape[0] - 2) // 2
    assert (grid[2:height, -34:-2] == 255).all()
    assert (grid[2 + height : 2 * height, -34:-2] == 0).all()
    margins = grid[:height, : -3 * 34], grid[height:, : -3 * 34]
    assert (margins[0] > 200).sum() < (margins[1] > 200).sum(), "17 takes more ink than 1"


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_as_adms_evaluator_reads_it(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels)).astype(np.uint8)
    save_npz(tmp_path / "a.npz", iter(pixels), [3, 1, 4, 1, 5])
    save_npz(tmp_path / "b.npz", list(pixels), np.array([3, 1, 4, 1, 5]))
    with np.load(tmp_path / "a.npz") as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (5, 4, 6, 3))
        assert (arrays["arr_0"] == pixels).all()
        assert arrays["arr_1"].dtype == np.int64
        assert arrays["arr_1"].tolist() == [3, 1, 4, 1, 5]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_npz_of_images_that_do_not_fit_is_not_written(tmp_path: Path) -> None:
    image = np.zeros((4, 6, 1), np.uint8)
    for images, labels, fault in (
        ([image, image[:3]], [0, 1], "got uint8 (3, 6, 1), expected uint8 (4, 6, 3)"),
        ([image, image[..., 0]], [0, 1], "got uint8 (4, 6)"),
        ([image, image.astype(float)], [0, 1], "got float64 (4, 6, 1)"),
        ([image], [0, 1], "got 1, expected 2"),
        ([image, image], [0], "got 2, expected 1"),
        ([], [], "got 0"),
    ):
        assert fault in raises_naming("images", lambda: save_npz(tmp_path / "a.npz", images, labels))  # noqa: B023
        assert not list(tmp_path.iterdir())
