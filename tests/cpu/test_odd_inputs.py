"""The CPU engine on what it is not usually given: not a number, infinite, huge and tiny values, odd shapes and layouts."""

from __future__ import annotations

from collections.abc import Callable

import cpu_variants as variants
import pytest
import torch
from cpu_chains import Chain, exact_chain, in_int8, random_chain
from support import error, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from ditfast import DiT, DiTConfig, cpu
from ditfast.cpu import engine
from ditfast.cpu.chain import DoesNotFit
from ditfast.ops import cpu_chain

pytestmark = pytest.mark.usefixtures("one_thread")
PRODUCTS = pytest.mark.parametrize("product", ["fp32", "bf16", "int8"])
NAN, INF = float("nan"), float("inf")
BARS = {"fp32": 2e-6, "bf16": 4e-3, "int8": 3e-2}  # where nearly all of what is told apart is rounding


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
def test_queries_whose_scores_are_all_minus_infinity_get_zeros(variant: engine.Engine, product: str) -> None:
    x, (attention, mlp), final = chain(product)
    tensors = places(x, [attention, mlp], final)
    tensors["v weight"][:20], tensors["v bias"][:20] = 0, 0  # of the first head, whose result is then known
    expected, _ = exact_chain(x, [attention], final)
    tensors["v bias"][:20] = 1
    tensors["q bias"][0], tensors["k bias"][0] = 1e30, -1e30
    found, _ = variant.run(x, [attention], final)
    assert error(found, expected) < BARS[product]


@PRODUCTS
@torch.no_grad()
def test_a_sample_with_nan_leaves_the_others_alone(variant: engine.Engine, product: str) -> None:
    x, steps, final = chain(product, B=3)
    expected, _ = variant.run(x, steps, final)
    x[1, 3, 5] = NAN
    found, _ = variant.run(x, steps, final)
    assert torch.equal(found[::2], expected[::2])
    assert found[1].isnan().all()


# ------------------------------------------------------------------------------------------------ huge and tiny
def scaled(place: str, factor: float) -> object:
    def change(x: Tensor, steps: list[cpu.Step], final: cpu.Final) -> None:
        places(x, steps, final)[place].mul_(factor)

    return pytest.param(change, id=f"{place} x {factor:g}")


def one(place: str, value: float) -> object:
    def change(x: Tensor, steps: list[cpu.Step], final: cpu.Final) -> None:
        tensor = places(x, steps, final)[place]
        tensor[(1,) * tensor.dim()] = value

    return pytest.param(change, id=f"one of {place} = {value:g}")


def a_row_of_zeros(x: Tensor, steps: list[cpu.Step], final: cpu.Final) -> None:
    for place in ("q weight", "proj weight", "fc1 weight", "fc2 weight"):
        places(x, steps, final)[place][1] = 0
    x[1] = 0


@pytest.mark.parametrize(
    "change",
    [
        a_row_of_zeros,
        *(scaled("x", factor) for factor in (0, 1e-40, 1e-20, 1e10, 1e18)),
        *(scaled("q weight", factor) for factor in (0, 1e-30, 1e4, 1e10)),
        *(scaled(place, factor) for place in ("fc1 weight", "fc2 weight") for factor in (1e-40, 1e-13, 1e6)),
        *(one(place, value) for place, value in (("x", 1e18), ("scale", 1e6), ("fc1 bias", 1e10), ("fc1 bias", -1e10))),
    ],
)
@PRODUCTS
@torch.no_grad()
def test_magnitudes(variant: engine.Engine, product: str, change: Callable[..., None]) -> None:
    given = chain(product)
    change(*given)
    for out, exact in zip(variant.run(*given), exact_chain(*given), strict=True):
        assert error(out, exact) < BARS[product]


@pytest.mark.parametrize("value", [1000.1, -3e4])
@PRODUCTS
@torch.no_grad()
def test_rows_without_variance(variant: engine.Engine, product: str, value: float) -> None:
    x, steps, final = chain(product, D=376)
    x[:, ::2] = value
    given = x, [step._replace(gate=torch.zeros_like(step.gate)) for step in steps], final
    for out, exact in zip(variant.run(*given), exact_chain(*given), strict=True):
        assert error(out, exact) < min(BARS[product], 4e-3)


# ------------------------------------------------------------------------------------------------ odd shapes and layouts
SHAPES = [(1, 1, 40, 2), (1, 1, 1, 1), (1, 3, 1, 1), (3, 1, 2, 2), (1, 2, 17, 1), (1, 300, 8, 1), (130, 1, 8, 2)]


@pytest.mark.parametrize(("B", "T", "D", "heads"), SHAPES)
@PRODUCTS
@torch.no_grad()
def test_shapes(variant: engine.Engine, product: str, B: int, T: int, D: int, heads: int) -> None:
    given = chain(product, B, T, D, heads)
    found, _ = variant.run(*given)
    assert error(found, exact_chain(*given)[0]) < BARS[product]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def sliced(tensor: Tensor) -> Tensor:
    """Every second row and every third column of something larger."""
    steps = tuple(slice(1, None, step) for step in (2, 3, 2)[: tensor.dim()])
    whole = tensor.new_full([step * size + 1 for step, size in zip((2, 3, 2), tensor.shape, strict=False)], NAN)
    whole[steps][tuple(slice(size) for size in tensor.shape)] = tensor
    return whole[steps][tuple(slice(size) for size in tensor.shape)]


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("layout", [transposed, sliced, expanded], ids=lambda f: f.__name__)
@PRODUCTS
@torch.no_grad()
def test_layouts(variant: engine.Engine, product: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, steps, final = chain(product)

    def laid_out(step: cpu.Step) -> cpu.Step:
        first, second = (tuple((layout(weight), layout(bias)) for weight, bias in linears) for linears in step.products[1:3])
        vectors = (None if vector is None else layout(vector) for vector in step[1:4])
        return cpu.Step(step.products._replace(first=first, second=second), *vectors, step.eps)

    given = layout(x), [laid_out(step) for step in steps], cpu.Final(*(layout(vector) for vector in final[:2]), final.eps)
    if layout is transposed:
        assert not given[1][0].products.first[0][0].is_contiguous()
    for out, exact in zip(variant.run(*given), exact_chain(*given), strict=True):
        assert error(out, exact) < BARS[product]


@pytest.mark.parametrize("layout", [transposed, sliced], ids=lambda f: f.__name__)
@PRODUCTS
@torch.no_grad()
def test_weights_of_any_layout_do_not_go_stale(
    variant: engine.Engine, product: str, layout: Callable[[Tensor], Tensor]
) -> None:
    x, steps, final = chain(product)
    ((weight, bias),) = steps[1].products.second
    weight = layout(weight)
    steps[1] = steps[1]._replace(products=steps[1].products._replace(second=((weight, bias),)))
    before, _ = variant.run(x, steps, final)
    weight.data.mul_(2)
    found, _ = variant.run(x, steps, final)
    assert error(found, exact_chain(x, steps, final)[0]) < BARS[product]
    assert error(found, before) > 0.1


# ------------------------------------------------------------------------------------------------ what does not go together
@pytest.mark.parametrize("place", range(2), ids=["weight", "bias"])
@torch.no_grad()
def test_weights_that_are_elsewhere(variant: engine.Engine, place: int) -> None:
    x, steps, final = chain("fp32")
    parts = list(steps[1].products.second[0])
    parts[place] = parts[place].to("meta")
    steps[1] = steps[1]._replace(products=steps[1].products._replace(second=(tuple(parts),)))
    with pytest.raises(DoesNotFit):
        variant.run(x, steps, final)


@pytest.mark.parametrize("rows", [64, 256])
@torch.no_grad()
def test_keys_and_values_of_another_width_are_refused(variant: engine.Engine, rows: int) -> None:
    """As they are elsewhere."""
    config = DiTConfig(depth=1, hidden_size=64, num_heads=4, input_size=8, num_classes=10, conditioning="cross_attention")
    model = randomize(DiT(config)).eval()
    kv = model.blocks[0].cross_attn.kv
    kv.weight, kv.bias = nn.Parameter(torch.randn(rows, 64)), nn.Parameter(torch.randn(rows))
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.randn(2, *config.input_shape), torch.rand(2), torch.tensor([1, 2]))


# ------------------------------------------------------------------------------------------------ a linear of few rows
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_torchs_default_dtype_does_not_matter(variant: engine.Engine, default: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(700, 40), torch.randn(700)
    given = chain("fp32")
    expected = F.linear(x, weight, bias), variant.run(*given)[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = cpu_chain.grouped_linear(x, ((weight, bias),)), variant.run(*given)[0]
    finally:
        torch.set_default_dtype(before)
    assert found[0].dtype == torch.float32
    assert error(found[0], expected[0]) < 1e-6
    assert torch.equal(found[1], expected[1])


@torch.no_grad()
def test_a_tall_weight_elsewhere_or_with_nan(variant: engine.Engine) -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(700, 40), torch.randn(700)
    assert cpu_chain.grouped_linear(x, ((weight.to("meta"), bias),)) is None
    assert cpu_chain.grouped_linear(x, ((weight, bias.to("meta")),)) is None
    weight[5, 7] = NAN
    x[1, 3] = INF
    found, expected = cpu_chain.grouped_linear(x, ((weight, bias),)), F.linear(x, weight, bias)
    assert torch.equal(found.isfinite(), expected.isfinite())


# ------------------------------------------------------------------------------------------------ the same bits
@PRODUCTS
@torch.no_grad()
def test_a_row_s_bits_are_its_own(variant: engine.Engine, product: str) -> None:
    """Whatever is computed beside it, on however many threads."""
    x, steps, final = chain(product, B=7, T=20)
    expected, _ = variant.run(x, steps, final)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(variant.run(x, steps, final)[0], expected)
    for part in (slice(2, 3), slice(3, 7)):
        some = [step._replace(shift=step.shift[part], scale=step.scale[part], gate=step.gate[part]) for step in steps]
        last = final._replace(shift=final.shift[part], scale=final.scale[part])
        assert torch.equal(variant.run(x[part], some, last)[0], expected[part])
