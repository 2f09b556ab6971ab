"""Under another default dtype or device: models are all in one dtype, and nothing computes on the default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import DTYPES, randomize
from torch import nn

import ditfast
from ditfast import DiT, DiTConfig, reference
from ditfast.config import CONDITIONINGS
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.evaluation import digits_classifier
from ditfast.images import from_pixels, to_pixels
from ditfast.sampling import sample
from ditfast.training.draws import Draws
from ditfast.training.loss_curve import LossCurve
from ditfast.training.objective import ImportanceSteps

pytestmark = pytest.mark.usefixtures("one_thread")
DDIM = steps(GaussianDiffusion("2"), "ddim")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tiny(conditioning: str = "adaln_zero") -> DiTConfig:
    return DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5, conditioning=conditioning)


@pytest.mark.parametrize("dtype", [*DTYPES, "fp64"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("kind", [DiT, reference.DiT], ids=["fast", "reference"])
def test_a_model_has_the_default_dtype(kind: Callable[[DiTConfig], nn.Module], conditioning: str, dtype: str) -> None:
    wanted = {**DTYPES, "fp64": torch.float64}[dtype]
    with default_dtype(wanted):
        made = kind(tiny(conditioning)).eval()
    assert {value.dtype for value in made.state_dict().values()} == {wanted}
    if kind is DiT and dtype == "fp64":
        return  # the reference's job
    model = randomize(made)
    with torch.no_grad():
        found = model(torch.randn(2, 4, 4, 4, dtype=wanted), torch.tensor([5.0, 900.0]), torch.tensor([1, 5]))
    assert found.dtype == wanted
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_are_those_of_a_cast_model(dtype: str) -> None:
    with default_dtype(DTYPES[dtype]):
        models = [DiT(tiny()), reference.DiT(tiny())]
    for model in models:
        assert torch.equal(model.pos_embed, DiT(tiny()).to(DTYPES[dtype]).pos_embed)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_is_made_on_the_default_device(device: str) -> None:
    with torch.device(device):
        models = [DiT(tiny()), reference.DiT(tiny())]
    torch.set_default_device(device)
    try:
        models += [DiT(tiny()), reference.DiT(tiny())]
    finally:
        torch.set_default_device(None)
    assert {value.device.type for model in models for value in model.state_dict().values()} == {device}


def outcomes(path: Any) -> dict[str, torch.Tensor]:
    """What must not depend on defaults."""
    model = ditfast.load_digits()
    ditfast.save_checkpoint(model.bfloat16(), path / "diffusers", layout="diffusers")
    again = ditfast.load_checkpoint(path / "diffusers")
    pixels = to_pixels(torch.linspace(-1, 1, 64, dtype=torch.float32, device="cpu").view(1, 1, 8, 8))
    draws = Draws(0, 0, 4, torch.device("cpu"))
    chosen, curve = ImportanceSteps(), LossCurve(1000)
    t, weights = chosen.draw(draws.uniform("times"))
    chosen.observe(t, weights)
    curve.add(t, weights)
    return {
        "images": sample(ditfast.load_digits(), DDIM, [3, 1], cfg_scale=2.0),
        "one scale an image": sample(ditfast.load_digits(), DDIM, [3, 1], cfg_scale=[2.0, 1.0], batch_invariant=True),
        "positions": again.pos_embed.detach(),
        "pixels": from_pixels(pixels),
        "uniform": draws.uniform("times"),
        "normal": draws.normal("noise", (2,)),
        "times": t,
        "curve": curve.sums,
    }


@pytest.mark.parametrize("changed", ["bf16", "fp16", "fp64", "meta"])
def test_results_do_not_depend_on_defaults(changed: str, tmp_path: Any) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = outcomes(tmp_path / "a")
    with torch.device("meta") if changed == "meta" else default_dtype({**DTYPES, "fp64": torch.float64}[changed]):
        found = outcomes(tmp_path / "b")
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_digits_classifier_is_the_same_under_another_default(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits_classifier, "STEPS", 3)
    make = digits_classifier.digits_classifier.__wrapped__  # the one that stays is another test's
    expected = make()
    with default_dtype(torch.bfloat16):
        found = make()
    assert all(torch.equal(a, b) for a, b in zip(found.trunk.parameters(), expected.trunk.parameters(), strict=True))
