from pathlib import Path

import pytest
import torch
from checkpoint_files import known_width, same_weights, saved, small, training_checkpoint, weights_of

from ditfast import load_checkpoint, save_checkpoint
from ditfast.cli import main


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ema, raw = weights_of(known_width(), seed=1), weights_of(known_width(), seed=2)
    path = saved(training_checkpoint(ema, raw), tmp_path / "x.pt")
    theirs, back = tmp_path / "theirs", tmp_path / "back.pt"
    assert main(["convert", str(path), str(theirs), "--to", "diffusers"]) == 0
    source, written, note = capsys.readouterr().out.splitlines()
    assert source.startswith(f"ema weights, official layout, from {path}; official flavour: timestep frequencies over 128")
    assert written == f"{theirs}: diffusers layout, {sum(v.numel() for v in ema.values()):,} parameters, torch.float32"
    assert note == (
        "note: diffusers computes this model otherwise: timestep frequencies over 127, not 128, "
        "guided channels 4, not 3, null class 1000, not 10"
    )
    assert main(["convert", str(theirs), str(back), "--to", "official"]) == 0
    assert "note" not in capsys.readouterr().out
    assert same_weights(torch.load(back, weights_only=True)["ema"], ema)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_weights(weights: str, tmp_path: Path) -> None:
    content = training_checkpoint(weights_of(known_width(), seed=1), weights_of(known_width(), seed=2))
    out = tmp_path / "out.safetensors"
    main(["convert", str(saved(content, tmp_path / "x.pt")), str(out), "--to", "official", "--weights", weights])
    assert same_weights(load_checkpoint(out).state_dict(), content[weights])  # type: ignore[arg-type]


def test_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of(known_width(), seed=1)
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(saved(weights, tmp_path / "x.pt")), str(out), "--to", "official", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(" parameters, torch.bfloat16")
    assert same_weights(load_checkpoint(out).state_dict(), {name: value.bfloat16() for name, value in weights.items()})


def test_a_dtype_that_cannot_hold_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of(known_width(), seed=1)
    weights["blocks.0.mlp.fc1.bias"][3] = 1e5
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(saved(weights, tmp_path / "x.pt")), str(out), "--to", "official", "--dtype", "fp16"]) == 2
    assert "blocks.0.mlp.fc1.bias" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "to", "fault"),
    [
        ("there.safetensors", "official", "exists already, expected a new name"),
        ("there.safetensors", "diffusers", "exists already, expected a new name"),
        ("x.bin", "official", "expected a name that ends in .safetensors, .pt, .pth"),
        ("no/x.pt", "official", "does not exist"),
        ("x", "diffusers", "input_size: got (8, 12), but diffusers' class has square grids only"),
    ],
)
def test_one_line_for_what_cannot_be(out: str, to: str, fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small(input_size=(8, 12))
    there = tmp_path / "there.safetensors"
    save_checkpoint(load_checkpoint(weights_of(config), config=config), there)
    before = there.read_bytes()
    assert main(["convert", str(there), str(tmp_path / out), "--to", to]) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert errors.startswith(f"ditfast convert: {tmp_path / out}: ")
    assert fault in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_bytes() == before


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "ditfast convert DiT-XL-2-256x256.pt dit-xl --to diffusers" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "ditfast convert dit.pt dit --to diffusers" in capsys.readouterr().out
