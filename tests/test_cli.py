import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ditfast.cli import main


def test_sample_writes_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.png"
    assert main(["sample", "--out", str(out), "--classes", "3", "1", "--per-class", "4", "--steps", "ddim5"]) == 0
    width, height = struct.unpack(">II", out.read_bytes()[16:24])
    assert width > 4 * 32
    assert height > 2 * 32
    assert "8 digits, 5 steps" in capsys.readouterr().out


def test_sample_is_reproducible(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(["sample", "--out", str(tmp_path / f"{name}.png"), "--per-class", "1", "--steps", "ddim4", "--seed", seed])
        contents.append((tmp_path / f"{name}.png").read_bytes())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "digits.jpg"], "expected a name that ends in .png"),
        (["--out", "missing/digits.png"], "the folder missing does not exist"),
        (["--out", "a.png", "--classes", "12"], "expected a digit 0..9"),
        (["--out", "a.png", "--per-class", "0"], "expected a positive integer"),
        (["--out", "a.png", "--seed", "-1"], "expected an integer 0..2^64-1"),
        (["--out", "a.png", "--cfg", "nan"], "expected a number"),
        ([], "--out"),
    ],
)
def test_sample_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["sample", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_sample_names_a_bad_respacing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--steps: respacing: got 'ddim51'"):
        main(["sample", "--out", str(tmp_path / "a.png"), "--steps", "ddim51"])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "torch",
        "triton",
        "gated_residual_layer_norm_modulate",
        "attention, head dim 72",
        "parity with the float64",
    ):
        assert expected in out


def test_help_has_examples() -> None:
    script = Path(sys.executable).with_name("ditfast")
    shown = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True).stdout
    assert "examples:" in shown
    assert "ditfast sample --out digits.png" in shown
