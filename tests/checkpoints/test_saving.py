"""What ``save_checkpoint`` leaves on the disk, and what it leaves alone; positions as official files store them."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_files import known_width, same_weights, small, weights_of
from interrupted_writes import interrupt_torch_save

from ditfast import CheckpointError, DiT, DiTConfig, load_checkpoint, model, reference, save_checkpoint
from ditfast.checkpoints import differences
from ditfast.checkpoints.files import WEIGHTS_FILE
from ditfast.config import CONDITIONINGS, Flavour


def loaded(config: DiTConfig, dtype: torch.dtype = torch.float32) -> DiT:
    return load_checkpoint(weights_of(config, dtype), config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_safetensors_loads_back_exactly(conditioning: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = small(conditioning=conditioning, input_size=(8, 12), mlp_ratio=3.3, flavour=Flavour(100, 1e-4, None))
    before = loaded(config, dtype)
    save_checkpoint(before, tmp_path / "x.safetensors")
    after = load_checkpoint(tmp_path / "x.safetensors")
    assert after.config == config
    assert same_weights(after.state_dict(), before.state_dict())


@pytest.mark.parametrize("name", ["x.pt", "x.pth"])
def test_official_code_loads_a_pt(name: str, tmp_path: Path) -> None:
    state = weights_of(small())
    save_checkpoint(loaded(small()), tmp_path / name)
    found = torch.load(tmp_path / name, weights_only=True)["ema"]
    assert same_weights(found, state)
    assert list(found) == list(state)
    reference.DiT(small()).load_state_dict(found)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in found.values())


def test_metadata_that_is_not_ours_is_passed_over(tmp_path: Path) -> None:
    config = known_width()
    for name, metadata in (("none", None), ("text", {"config": "dit.yaml"}), ("json", {"config": '{"depth": 2, "lr": 1}'})):
        safetensors.torch.save_file(weights_of(config), tmp_path / name, metadata=metadata)
        assert load_checkpoint(tmp_path / name).config == config
    safetensors.torch.save_file(weights_of(config), tmp_path / "bad", metadata={"config": '{"depth": -1}'})
    with pytest.raises(CheckpointError, match="config: depth: got -1, expected a positive integer"):
        load_checkpoint(tmp_path / "bad")


@pytest.mark.parametrize(
    ("name", "layout", "fault"),
    [
        ("x.bin", "official", r"x\.bin: expected a name that ends in \.safetensors, \.pt, \.pth for the official layout"),
        ("folder", "official", r"folder: expected a name that ends in"),
        ("folder.pt", "official", r"folder\.pt: is a folder, expected a file"),
        ("missing/x.pt", "official", r"x\.pt: the folder .*missing does not exist"),
        ("folder", "diffusers", r"folder: exists already, expected the name of a new folder"),
        ("file", "diffusers", r"file: exists already"),
        ("missing/x", "diffusers", r"the folder .*missing does not exist"),
    ],
)
def test_places_where_nothing_can_go(name: str, layout: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=fault):
        save_checkpoint(DiT(small()), tmp_path / name, layout=layout)
    assert sorted(tmp_path.rglob("*")) == before


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: got a DiT, expected a ditfast\.DiT"):
        save_checkpoint(reference.DiT(small()), tmp_path / "x.pt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout: got 'timm', expected one of official, diffusers"):
        save_checkpoint(DiT(small()), tmp_path / "x.pt", layout="timm")


@pytest.mark.parametrize(
    ("layout", "writer"),
    [
        ("x.safetensors", "ditfast.checkpoints.save.save_file"),
        ("x.pt", "torch.save"),
        ("x", "ditfast.checkpoints.save.json.dumps"),
    ],
    ids=["safetensors", "pt", "diffusers"],
)
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_save_that_fails_leaves_what_was_there(
    layout: str, writer: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / layout
    fresh = loaded(small())
    if path.suffix:
        path.write_bytes(b"the old file")

    def write_and_fail(*arguments: object, **options: object) -> None:
        for argument in arguments:
            if isinstance(argument, Path):
                argument.write_bytes(b"half of it")
            elif isinstance(argument, io.IOBase):
                argument.write(b"half of it")
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(writer, write_and_fail)
        expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="cannot be written: .*No space left" if isinstance(failure, OSError) else None):
            save_checkpoint(fresh, path, layout="official" if path.suffix else "diffusers")
    if path.suffix:
        assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == ([path] if path.suffix else [])
    save_checkpoint(fresh, path, layout="official" if path.suffix else "diffusers")
    assert same_weights(load_checkpoint(path, config=small()).state_dict(), fresh.state_dict())


def test_ctrl_c_in_a_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    model = loaded(small())
    save_checkpoint(model, path)
    before = path.read_bytes()
    interrupt_torch_save(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, path)
    assert [path.read_bytes()] == [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_the_same_weights_are_the_same_bytes(name: str, tmp_path: Path) -> None:
    model, written = loaded(small()), set()
    for folder in map(str, range(8)):  # the two entries of safetensors' metadata come in any order
        (tmp_path / folder).mkdir()
        save_checkpoint(model, tmp_path / folder / name)
        written.add((tmp_path / folder / name).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_other_programs_read_the_format_in_the_metadata(layout: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if layout == "official" else "x")
    save_checkpoint(loaded(small()), path, layout=layout)
    with safetensors.safe_open(path if path.is_file() else path / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000], ids=oct)
def test_files_have_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for name in ("x.safetensors", "x.pt"):
            save_checkpoint(loaded(small()), tmp_path / name)
        save_checkpoint(loaded(small()), tmp_path / "folder", layout="diffusers")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = ("x.safetensors", "x.pt", "config.json", "diffusion_pytorch_model.safetensors")
    assert modes == {"folder": 0o777 & ~umask, **dict.fromkeys(files, 0o666 & ~umask)}


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_weights_that_would_not_load_back_are_not_written(layout: str, tmp_path: Path) -> None:
    broken = DiT(small())
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.bias[2] = torch.inf
    with pytest.raises(CheckpointError, match=r"not finite blocks\.1\.mlp\.fc1\.bias \(1 of 192 values\)"):
        save_checkpoint(broken, tmp_path / ("x.pt" if layout == "official" else "x"), layout=layout)
    wrapped = DiT(small())
    torch.nn.utils.parametrizations.weight_norm(wrapped.blocks[0].mlp.fc1)
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.mlp\.fc1\.weight; unexpected blocks\.0\.mlp\.fc1\.parametr"):
        save_checkpoint(wrapped, tmp_path / ("x.pt" if layout == "official" else "x"), layout=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "layout", "said"),
    [
        ({}, "official", ""),
        ({"flavour": "diffusers"}, "official", "timestep frequencies over 128, not 127, guided channels 3, not 4, "),
        ({"flavour": Flavour(127, 1e-4, None), "num_classes": 1000}, "diffusers", ""),
        ({"num_classes": 1000}, "diffusers", "timestep frequencies over 127, not 128, guided channels 4, not 3"),
        ({"in_channels": 3}, "diffusers", "timestep frequencies over 127, not 128, null class 1000, not 10"),
    ],
)
def test_differences(fields: dict[str, object], layout: str, said: str) -> None:
    found = differences(small(**fields), layout)
    assert found.startswith(said)
    assert bool(found) == bool(said)


# ------------------------------------------------------------------------------------------------ positions
def textbook_positions(width: int, height: int, breadth: int) -> np.ndarray:
    omega = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    columns, rows = np.meshgrid(np.arange(breadth), np.arange(height))
    angles = [np.outer(axis.reshape(-1), omega) for axis in (columns, rows)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


@pytest.mark.parametrize("grid", [(16, 16), (32, 32), (8, 24)], ids=["16x16", "32x32", "8x24"])
@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
def test_positions_are_the_textbooks_bit_for_bit(width: int, grid: tuple[int, int]) -> None:
    config = DiTConfig(hidden_size=width, num_heads=1, patch_size=1, input_size=grid)
    expected = textbook_positions(width, *grid)
    for module in (model, reference):
        assert np.array_equal(module.sincos_positions(config)[0].numpy(), expected)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
def test_positions_are_diffusers_bit_for_bit(width: int, size: int) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    config = DiTConfig(hidden_size=width, num_heads=1, patch_size=1, input_size=size)
    theirs = embeddings.get_2d_sincos_pos_embed(width, size, base_size=size, output_type="pt").float()
    assert torch.equal(model.sincos_positions(config)[0], theirs)
