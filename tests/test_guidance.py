"""Scales of ``forward_with_cfg``: one, or one an image, whatever holds them; never spread over another dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import error, randomize
from torch import Tensor, nn

from ditfast import DiT, DiTConfig, reference
from ditfast.argument_checks import as_guidance_scale
from ditfast.sampling.checks import as_scales

pytestmark = pytest.mark.usefixtures("one_thread")

B = 8  # as the width
CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=8, num_classes=5)
SCALES = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 0.0, -1.0]
KINDS: dict[str, Callable[[list[float]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "fp64": lambda scales: torch.tensor(scales, dtype=torch.float64),
    "column": lambda scales: torch.tensor(scales).view(-1, 1, 1, 1),
}


@pytest.fixture(scope="module", params=[DiT, reference.DiT], ids=["fast", "reference"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return randomize(request.param(CONFIG)).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, t, y = torch.randn(B, *CONFIG.input_shape), torch.linspace(0, 999, B), torch.arange(B) % 5
    return torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, CONFIG.null_class)])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_each_image_has_its_scale(kind: Callable[[list[float]], Any], model: Any) -> None:
    given = inputs()
    found = model.forward_with_cfg(*given, kind(SCALES))
    for k, scale in enumerate(SCALES):
        alone = model.forward_with_cfg(*(value[[k, B + k]] for value in given), scale)
        assert error(found[[k, B + k]], alone) < 1e-6
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    "scale", [[2.5], (2.5,), np.array([2.5]), np.array(2.5), torch.tensor(2.5), torch.tensor([2.5])], ids=str
)
@torch.no_grad()
def test_one_scale_is_that_of_all_images(scale: Any, model: Any) -> None:
    given = inputs()
    assert error(model.forward_with_cfg(*given, scale), model.forward_with_cfg(*given, 2.5)) < 1e-6


@pytest.mark.parametrize(
    ("scale", "got"),
    [
        (SCALES[:2], r"\[1\.0, 1\.5\]"),
        (SCALES * 2, "a list of length 16"),
        (torch.ones(2 * B), r"a tensor \[16\] of torch\.float32"),
        (torch.ones(1, B), r"a tensor \[1, 8\] of torch\.float32"),
        (torch.ones(B, 4, 1, 1), r"a tensor \[8, 4, 1, 1\] of torch\.float32"),
        (torch.ones(B, dtype=torch.bool), r"a tensor \[8\] of torch\.bool"),
        ([*SCALES[:7], float("nan")], "nan"),
        ([], r"\[\]|a list of length 0"),
        ("3", "'3'"),
        (None, "None"),
    ],
    ids=["two", "sixteen", "tensor of 16", "row", "channels", "bools", "nan", "none", "text", "None"],
)
def test_other_numbers_of_scales_are_refused(scale: Any, got: str, model: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^cfg_scale: got ({got}), expected a finite number"):
        model.forward_with_cfg(*inputs(), scale)


def test_a_scale_has_a_gradient(model: Any) -> None:
    scales = torch.tensor(SCALES, requires_grad=True)
    model.forward_with_cfg(*inputs(), scales)[:B, :3].square().sum().backward()
    assert scales.grad is not None
    assert scales.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_the_output_keeps_the_models_dtype(dtype: torch.dtype) -> None:
    for kind in (DiT, reference.DiT):
        model: Any = randomize(kind(CONFIG)).eval().to(dtype)
        x, t, y = inputs()
        assert model.forward_with_cfg(x.to(dtype), t, y, torch.tensor(SCALES)).dtype == dtype


@torch.no_grad()
def test_scales_of_images_are_traced_and_compiled() -> None:
    model: Any = randomize(DiT(CONFIG)).eval()
    given, scales = inputs(), torch.tensor(SCALES)
    expected = model.forward_with_cfg(*given, scales)
    compiled = torch.compile(model.forward_with_cfg, backend="eager", fullgraph=True)
    assert error(compiled(*given, scales), expected) < 1e-6


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["tensor", "fp64", "column"])
def test_scales_of_images_keep_to_their_images_while_traced(kind: str) -> None:
    def spread(scales: Tensor) -> Tensor:
        return torch.ones(B, 1, 1, B) * as_guidance_scale(scales, B, torch.ones(1))

    scales = KINDS[kind](SCALES)
    traced: Any = torch.jit.trace(spread, (scales,))
    found = traced(scales + 1)
    assert torch.equal(found, (torch.tensor(SCALES) + 1).view(B, 1, 1, 1).expand(B, 1, 1, B))
    one: Any = torch.jit.trace(spread, (torch.tensor(2.0),))
    assert (one(torch.tensor(3.0)) == 3).all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_sampling_takes_the_scales_of_the_model(kind: Callable[[list[float]], Any]) -> None:
    cpu = torch.device("cpu")
    assert torch.equal(as_scales(kind(SCALES), B, cpu), torch.tensor(SCALES))
    for one in (kind([2.0]), 2.0, torch.tensor(2), np.array(2.0)):
        assert torch.equal(as_scales(one, B, cpu), torch.full((B,), 2.0))
    assert as_scales(kind([1.0]), B, cpu) is None
    with pytest.raises(ValueError, match=r"^cfg_scale: got nan, expected a finite number"):
        as_scales(kind([*SCALES[1:], float("nan")]), B, cpu)
