"""The CPU engine on what it is not usually given: not a number, infinite, huge and tiny values, odd shapes and layouts."""

from __future__ import annotations

import cpu_variants as variants
import pytest
import torch
from cpu_chains import Chain, exact_chain, in_int8, random_chain
from torch import Tensor

from ditfast import cpu
from ditfast.cpu import engine

pytestmark = pytest.mark.usefixtures("one_thread")
PRODUCTS = pytest.mark.parametrize("product", ["fp32", "bf16", "int8"])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["native", "emulated_avx512"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> engine.Engine:
    return variants.take(request.param, monkeypatch)


def chain(product: str, B: int = 2, T: int = 9, D: int = 40, heads: int = 2) -> Chain:
    dtype = torch.bfloat16 if product == "bf16" else torch.float32
    x, steps, final = random_chain(B, T, D, heads, dtype, "sample")
    return x, in_int8(steps) if product == "int8" else steps, final


# ------------------------------------------------------------------------------------------------ not a number
def places(x: Tensor, steps: list[cpu.Step], final: cpu.Final) -> dict[str, Tensor]:
    """All that goes into a chain."""
    attention, mlp = steps
    (qkv,), (proj,) = attention.products.first, attention.products.second
    (fc1,), (fc2,) = mlp.products.first, mlp.products.second
    q, k, v = zip(*(part.chunk(3) for part in qkv), strict=True)
    found = {"x": x, "gate": attention.gate, "shift": mlp.shift, "scale": attention.scale, "final shift": final.shift}
    for name, (weight, bias) in {"q": q, "k": k, "v": v, "proj": proj, "fc1": fc1, "fc2": fc2}.items():
        found |= {f"{name} weight": weight, f"{name} bias": bias}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("T", [1, 2, 9])
@PRODUCTS
@torch.no_grad()
def test_what_is_no_finite_number_does_not_turn_into_one(variant: engine.Engine, product: str, T: int, value: float) -> None:
    for name in places(*chain(product)):
        given = chain(product, T=T)
        place = places(*given)[name]
        place[(-1,) * place.dim()] = value
        for exact, out in zip(exact_chain(*given), variant.run(*given), strict=True):
            assert not (~exact.isfinite() & out.isfinite()).any(), name


@pytest.mark.parametrize("T", [1, 2, 9])
@PRODUCTS
@torch.no_grad()
def test_scores_that_are_no_numbers(variant: engine.Engine, product: str, T: int) -> None:
    """Of values so small that no sum overflows."""
    for name in ("q bias", "k bias"):
        x, (attention, _), final = chain(product, T=T)
        for part in attention.products.first[0]:
            part[80:] *= 0.01
        places(x, [attention, _], final)[name][-1] = NAN
        found, _ = variant.run(x, [attention], final)
        assert found.isnan().all(), name


@PRODUCTS
@torch.no_grad()
def test_a_sample_with_nan_leaves_the_others_alone(variant: engine.Engine, product: str) -> None:
    x, steps, final = chain(product, B=3)
    expected, _ = variant.run(x, steps, final)
    x[1, 3, 5] = NAN
    found, _ = variant.run(x, steps, final)
    assert torch.equal(found[::2], expected[::2])
    assert found[1].isnan().all()
