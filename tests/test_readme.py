"""The README's promises that a machine can check."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm_style
import torch
from support import randomize

import ditfast
from ditfast import DiTConfig, reference

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLE, CHECKPOINT, SIT, DIFFUSERS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONFIG = DiTConfig(depth=2, hidden_size=384, num_heads=6, input_size=8)


def test_the_example_runs() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    assert names["out"].shape == (2, 8, 32, 32)
    assert names["guided"].shape == (4, 8, 32, 32)


def test_a_checkpoint_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"ema": randomize(reference.DiT(CONFIG)).state_dict()}, tmp_path / "DiT-XL-2-256x256.pt")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"x": torch.randn(1, 4, 8, 8), "t": torch.tensor([5]), "y": torch.tensor([7])}
    exec(CHECKPOINT, names)
    assert names["model"].config == CONFIG
    assert names["out"].shape == (1, 8, 8, 8)


def test_a_live_model_is_accelerated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def small_sit(input_size: int) -> torch.nn.Module:
        return timm_style.SiT(depth=2, grid=(input_size // 8, input_size // 8))

    models = types.ModuleType("models")
    models.SiT_models = {"SiT-XL/2": small_sit}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "models", models)
    exec(SIT, {})
    lines = capsys.readouterr().out.splitlines()
    assert ["swapped" in line for line in lines[1:]] == [True, True]


def test_a_pipeline_is_accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, out_channels=8
    ).eval()  # as from_pretrained does
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.DiTPipeline, "from_pretrained", lambda name: pipeline)
    names: dict[str, Any] = {}
    exec(DIFFUSERS, names)
    assert len(names["images"]) == 2
    assert all(row.swapped for row in ditfast.acceleration_report(model).rows)


def test_figures_and_commands_exist() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for path in re.findall(r"\]\((?!http)(.*?)\)", prose):
        assert (ROOT / path).is_file()
    for name in re.findall(r"^ {4}(\S+/?) {2,}", README[README.index("## The house") :], re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_test_command() -> None:
    command = "pip install -e '.[test]' && pytest"
    assert command in README
    assert command in (ROOT / ".ci" / "run").read_text()
