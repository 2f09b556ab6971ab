import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_cli import draw

from ditfast import cpu
from ditfast.cli import COMMANDS, main
from ditfast.commands.doctor import _products
from ditfast.cpu import library


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "torch",
        "triton",
        "gated_residual_layer_norm_modulate",
        "T=256 H=16 d=72",
        "mlp, in training",
        "tuning cache: none, without a CUDA device",
        "parity with the float64",
    ):
        assert expected in out


@pytest.mark.skipif(cpu.found()[0] is None, reason="needs the CPU engine")
def test_doctor_names_the_cpu_engines_products(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert f"the CPU engine, all in one call; products: {_products(library.cpu_features())}\n" in capsys.readouterr().out
    assert _products(frozenset(library.AVX2)) == "fp32, bf16 widened to fp32, int8 by pairs"
    without = frozenset({*library.AVX2, *library.AVX512})
    assert _products(without) == "fp32, bf16 widened to fp32, int8 by pairs"
    assert _products(without | {"avx512_vnni"}) == "fp32, bf16 widened to fp32, int8 by VNNI"
    assert _products(without | {*library.EXTRAS}) == "fp32, bf16, int8 by VNNI"


def test_help_has_examples() -> None:
    script = Path(sys.executable).with_name("ditfast")
    shown = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True).stdout
    assert "examples:" in shown
    assert "\n  ditfast sample " in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"\n  ditfast {command}" in capsys.readouterr().out


def test_python_runs_the_package_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ditfast", "sample", "--out", "digits.jpg"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ditfast sample: error: argument --out: got 'digits.jpg'" in done.stderr


def test_evaluate_reads_what_sample_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    out = tmp_path / "run"
    assert draw(out, "--per-class", "4", "--npz") == 0
    capsys.readouterr()
    scores = []
    for images in (out, out / "samples.npz"):
        assert main(["evaluate", str(images), "--reference", "digits", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["count"] == 40
        scores.append(found["scores"])
    assert scores[0] == scores[1] != {}


BAD_RANKS = {
    "word": ({"RANK": "zero"}, "RANK: got 'zero', expected a number from 0, as torchrun sets it"),
    "empty": ({"WORLD_SIZE": ""}, "WORLD_SIZE: got '', expected a number from 1, as torchrun sets it"),
    "local-fraction": ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK: got '0.5', expected a number from 0, as torchrun sets it"),
    "negative": ({"RANK": "-1"}, "RANK: got '-1', expected a number from 0, as torchrun sets it"),
    "python-only": ({"RANK": "0_0"}, "RANK: got '0_0', expected a number from 0, as torchrun sets it"),
    "no-ranks": ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0', expected a number from 1, as torchrun sets it"),
    "beyond": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: got '2', expected a number below WORLD_SIZE=2, as torchrun sets it"),
    "without-world": ({"RANK": "1"}, "RANK: got '1', expected a number below WORLD_SIZE=1, as torchrun sets it"),
}
COMMANDS_OF_RANKS = {
    "sample": ["sample", "--out", "out.png", "--device", "cpu"],
    "train": ["train", "--data", "digits", "--out", "run", "--steps", "1", "--device", "cpu"],
    "extract-latents": ["extract-latents", "images", "latents", "--device", "cpu"],
}


@pytest.mark.parametrize("kind", BAD_RANKS)
@pytest.mark.parametrize("command", COMMANDS_OF_RANKS)
def test_a_rank_that_is_no_number_is_one_line(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment, message = BAD_RANKS[kind]
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(COMMANDS_OF_RANKS[command]) == 2
    assert capsys.readouterr() == ("", f"ditfast {command}: {message}\n")
    assert not list(tmp_path.iterdir())
