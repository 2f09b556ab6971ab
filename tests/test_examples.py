"""Every script of examples/ runs, and shows what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

import ditfast
from ditfast.images import load_png

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generate_draws_ten_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = load("generate").main(["--out", str(tmp_path / "digits.png")])
    assert (load_png(tmp_path / "digits.png") == samples.grid()).all()
    assert samples.labels.tolist() == list(range(10))
    assert "step 40, time 180" in capsys.readouterr().out


def test_image_to_image_keeps_something_of_its_sources(tmp_path: Path) -> None:
    sources, changed = load("image_to_image").main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"sources.png", "changed.png"}
    fresh = ditfast.sample(ditfast.load_digits(), labels=[7] * 8, seed=1)
    likeness = [F.cosine_similarity(sources.latents.flatten(1), s.latents.flatten(1)).mean() for s in (changed, fresh)]
    assert likeness[0] > likeness[1] + 0.03
    assert not torch.equal(changed.latents, fresh.latents)


def test_every_example_is_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "generate",
        "image_to_image",
        "train_on_digits",
    }
