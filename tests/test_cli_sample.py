"""``ditfast sample`` on the digits, and on small checkpoints with a VAE."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import small, weights_of
from sampling_cli import checkpoint, content, draw, words
from tiny_vae import saved as saved_vae

from ditfast import cpu, load_checkpoint, load_digits, save_checkpoint
from ditfast.commands.sample import _in_int8
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.images import Pixels, load_png, save_png, to_pixels
from ditfast.sampling import folder as folder_module
from ditfast.sampling import sample
from ditfast.sampling.painter import drawn_label
from ditfast.sampling.ranks import Ranks
from ditfast.sampling.recipe import FLOW_SOLVERS
from ditfast.threads import one_thread


def settings(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())["settings"]


# ------------------------------------------------------------------------------------------------ a grid
def test_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.png"
    assert draw(out, "--classes", "3", "1", "--per-class", "4") == 0
    width, height = struct.unpack(">II", out.read_bytes()[16:24])
    assert width > 4 * 32
    assert height > 2 * 32
    assert capsys.readouterr().out == f"{out}: 8 images, ddim, 4 steps, guidance 2, seed 0, fp32\n"
    assert [path.name for path in tmp_path.iterdir()] == ["digits.png"]


@pytest.mark.skipif(cpu.found()[0] is None, reason="needs the CPU engine")
def test_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    numbers = ["--num", "6", "--dtype"]
    assert draw(out, *numbers, "int8") == 0
    measured, drawn = capsys.readouterr().out.splitlines()
    assert measured.startswith("int8: ")
    assert drawn == f"{out}: 6 images, ddim, 4 steps, guidance 2, seed 0, int8"
    assert settings(out)["dtype"] == "int8"
    images = content(out)
    (out / "000003.png").unlink()
    assert draw(out, *numbers, "int8") == 0
    assert content(out) == images
    assert draw(out, *numbers, "fp32") == 2
    assert 'other settings: dtype: was "int8", is "fp32"' in capsys.readouterr().err
    assert draw(tmp_path / "plain", *numbers, "fp32") == 0
    assert content(tmp_path / "plain")["000003.png"] != images["000003.png"]


@pytest.mark.skipif(cpu.found()[0] is None, reason="needs the CPU engine")
def test_one_rank_prints_what_int8_costs(capsys: pytest.CaptureFixture[str]) -> None:
    models = [_in_int8(load_digits(), Ranks(rank, 2)) for rank in (0, 1)]
    assert capsys.readouterr().out.count("int8: ") == 1
    assert [model.int8 for model in models] == [True, True]


def test_a_grid_is_reproducible(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert draw(tmp_path / f"{name}.png", "--per-class", "1", "--seed", seed) == 0
    grids = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert grids[0] == grids[1] != grids[2]


def test_guidance_has_a_scale_and_an_interval(tmp_path: Path) -> None:
    guidance = {"always": [], "less": ["--cfg", "1.5"], "some": ["--cfg-interval", "0", "500"]}
    without = {"one": ["--cfg", "1"], "never": ["--cfg-interval", "2000", "3000"]}
    for name, arguments in (guidance | without).items():
        assert draw(tmp_path / f"{name}.png", "--classes", "3", "--per-class", "4", *arguments) == 0
    grids = content(tmp_path)
    assert grids["never.png"] == grids["one.png"]
    assert len(set(grids.values())) == 4


def test_names_stand_for_classes(tmp_path: Path) -> None:
    assert draw(tmp_path / "a.png", "--classes", "7", "0", "7", "--per-class", "2") == 0
    names = ["--labels", words(tmp_path / "words"), "--classes", "Seven", "0", "seven", "--per-class", "2"]
    assert draw(tmp_path / "b.png", *names) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ------------------------------------------------------------------------------------------------ a folder
def test_a_folder(tmp_path: Path) -> None:
    classes = ["--classes", "3", "1", "--per-class", "5", "--seed", "7"]
    assert draw(tmp_path / "run", *classes, "--npz") == 0
    assert draw(tmp_path / "grid.png", *classes) == 0
    made = content(tmp_path / "run")
    assert sorted(made) == [*(f"{k:06d}.png" for k in range(10)), "grid.png", "run.json", "samples.npz"]
    assert made["grid.png"] == (tmp_path / "grid.png").read_bytes()
    labels = torch.tensor([3] * 5 + [1] * 5)
    schedule = steps(GaussianDiffusion("ddim4"), "ddim")
    options: dict[str, Any] = {"cfg_scale": 2.0, "seed": 7, "clip": True}
    with one_thread():
        pixels = np.concatenate(
            [
                to_pixels(sample(load_digits(), schedule, labels[block.start : block.stop], images=block, **options))
                for block in (range(0, 4), range(4, 8), range(8, 10))
            ]
        )
    assert all((load_png(tmp_path / "run" / f"{k:06d}.png") == pixels[k]).all() for k in range(10))
    with np.load(tmp_path / "run" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (10, 8, 8, 3)
        assert (arrays["arr_0"] == pixels).all()
        assert (arrays["arr_1"] == labels.numpy()).all()


def test_progress_is_shown_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("ditfast.terminal.is_terminal", lambda console: True)
    assert draw(tmp_path, "--num", "10") == 0
    shown = capsys.readouterr().err
    for expected in ("sampling", "10/10 images", "images/s", "0:00:00"):
        assert expected in shown


def test_num_draws_labels(tmp_path: Path) -> None:
    assert draw(tmp_path / "all", "--num", "9", "--npz", "--seed", "3") == 0
    assert draw(tmp_path / "some", "--num", "9", "--npz", "--classes", "2", "8") == 0
    with np.load(tmp_path / "all" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [drawn_label(range(10), k, seed=3) for k in range(9)]
    with np.load(tmp_path / "some" / "samples.npz") as arrays:
        assert set(arrays["arr_1"].tolist()) == {2, 8}
    assert "grid.png" not in content(tmp_path / "all")


def test_a_folder_is_finished_and_then_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(tmp_path, "--num", "10", "--npz") == 0
    before = content(tmp_path)
    for name in ("000001.png", "000002.png", "000009.png", "samples.npz"):
        (tmp_path / name).unlink()
    capsys.readouterr()
    assert draw(tmp_path, "--num", "10", "--npz") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}: 7 of 10 images are there already"
    assert content(tmp_path) == before
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert draw(tmp_path, "--num", "10", "--npz") == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times


def test_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, "--num", "3")
    before = content(tmp_path)
    capsys.readouterr()
    changed = ["--num", "4", "--cfg", "3", "--seed", "1", "--dtype", "bf16", "--classes", "5", "--cfg-interval", "100", "900"]
    assert draw(tmp_path, *changed) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"ditfast sample: {tmp_path}: holds a run with other settings: weights: was ")
    assert found.count("\n") == 1
    for difference in (
        'classes: was "all", is [5]',
        "num: was 3, is 4",
        "seed: was 0, is 1",
        "cfg: was 2.0, is 3.0",
        "cfg_interval: was null, is [100.0, 900.0]",
        'dtype: was "fp32", is "bf16"',
    ):
        assert difference in found
    assert content(tmp_path) == before


def test_a_full_disk_is_a_clean_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "whole", "--num", "10")
    capsys.readouterr()

    def save_or_fail(path: Path, pixels: Pixels) -> None:
        if path.name == "000006.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_png(path, pixels)

    monkeypatch.setattr(folder_module, "save_png", save_or_fail)
    assert draw(tmp_path / "run", "--num", "10") == 1
    assert capsys.readouterr().err == (
        f"ditfast sample: {tmp_path / 'run' / '000006.png'}: No space left on device; "
        "every image there is whole, and the same command goes on from here\n"
    )
    assert sorted(content(tmp_path / "run")) == [*(f"{k:06d}.png" for k in range(6)), "run.json"]
    monkeypatch.undo()
    assert draw(tmp_path / "run", "--num", "10") == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_grid_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, pixels: Pixels) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ditfast.commands.sample_out.save_png", fail)
    assert draw(tmp_path / "a.png", "--per-class", "1") == 1
    assert capsys.readouterr().err == f"ditfast sample: {tmp_path / 'a.png'}: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted; {out}: 0 of 10 images are there; the same command makes the rest"),
        (FloatingPointError("image 3 came out infinite or NaN"), 1, "image 3 came out infinite or NaN; --dtype fp32 has"),
        (torch.OutOfMemoryError("20 lines"), 1, "--batch: got 4, for which the device has too little memory (about "),
    ],
)
def test_a_stop_is_one_line(
    error: BaseException,
    status: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("ditfast.sampling.Sampler.__call__", fail)
    assert draw(tmp_path / "run", "--num", "10") == status
    found = capsys.readouterr().err
    assert found.startswith(f"ditfast sample: {line.format(out=tmp_path / 'run')}")
    assert found.count("\n") == 1
    assert sorted(content(tmp_path / "run")) == ["run.json"]


# ------------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize(("solver", "calls"), [("ddpm", 3), ("ddim", 3), ("euler", 3), ("heun", 6), ("sde", 3)])
def test_a_checkpoint_with_a_vae(solver: str, calls: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    path = checkpoint(tmp_path / "dit.safetensors", small())
    arguments = ["--checkpoint", str(path), "--vae", str(saved_vae(tmp_path / "vae")), "--num", "3", "--batch", "2"]
    insist = ["--force-solver"] if solver in FLOW_SOLVERS else []
    assert draw(tmp_path / "run", "--steps", "3", "--solver", solver, *insist, *arguments) == 0
    assert f"3 images, {solver}, {calls} steps, guidance 4, seed 0" in capsys.readouterr().out
    images = [load_png(tmp_path / "run" / f"{k:06d}.png") for k in range(3)]
    assert {image.shape for image in images} == {(16, 16, 3)}
    assert all(image.std() > 1 for image in images)
    assert settings(tmp_path / "run")["vae"]["scaling_factor"] == 0.18215
    about = json.loads((tmp_path / "run" / "run.json").read_text())["about"]
    assert about["checkpoint"] == str(path)
    assert about["vae"] == str(tmp_path / "vae")


def test_other_weights_are_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "dit.safetensors", small(in_channels=3))
    arguments = ["--checkpoint", str(path), "--classes", "1", "--per-class", "2"]
    assert draw(tmp_path / "run", *arguments) == 0
    moved = path.rename(tmp_path / "moved.safetensors")
    arguments[1] = str(moved)
    assert draw(tmp_path / "run", *arguments) == 0
    model = load_checkpoint(moved)
    with torch.no_grad():
        model.final_layer.linear.bias[0] += 1e-6
    save_checkpoint(model, moved)
    capsys.readouterr()
    assert draw(tmp_path / "run", *arguments) == 2
    assert "holds a run with other settings: weights: was " in capsys.readouterr().err


def test_a_pipelines_own_vae_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "pipeline").mkdir()
    model = load_checkpoint(weights_of(small()), config=small())
    save_checkpoint(model, tmp_path / "pipeline" / "transformer", layout="diffusers")
    saved_vae(tmp_path / "pipeline" / "vae")
    arguments = ["--checkpoint", str(tmp_path / "pipeline"), "--classes", "4", "--steps", "2", "--dtype", "bf16"]
    assert draw(tmp_path / "grid.png", *arguments) == 0
    assert "1 images, ddpm, 2 steps, guidance 4" in capsys.readouterr().out
