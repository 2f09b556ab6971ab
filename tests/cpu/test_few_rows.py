"""The CPU engine's few rows through many linears: the modulations of all blocks."""

from __future__ import annotations

import cpu_variants as variants
import pytest
import torch
from support import error
from torch.nn import functional as F

from ditfast.cpu import engine, packed
from ditfast.ops import cpu_chain

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=variants.VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> engine.Engine:
    return variants.take(request.param, monkeypatch)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> engine.Engine:
    return variants.take("native", monkeypatch)


@DTYPES
@pytest.mark.parametrize(
    ("M", "K", "widths"),
    [(1, 1, [1]), (1, 100, [7, 1, 2]), (2, 16, [5]), (3, 33, [4, 9]), (7, 64, [9, 2, 3, 30]), (16, 40, [11, 1])],
    ids=str,
)
@torch.inference_mode()
def test_few_rows_through_linears_side_by_side(
    variant: engine.Engine, M: int, K: int, widths: list[int], dtype: torch.dtype
) -> None:
    x = torch.randn(M, K).to(dtype)
    linears = tuple((torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)) for N in widths)
    exact = torch.cat([F.linear(x.double(), weight.double(), bias.double()) for weight, bias in linears], dim=1)
    found = cpu_chain.grouped_linear(x, linears)
    assert found is not None
    assert found.dtype == dtype
    assert error(found, exact) <= error(exact.to(dtype), exact) + 1e-6
    for threads in (3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(cpu_chain.grouped_linear(x[-1:], linears), found[-1:])
    one_by_one = [cpu_chain.grouped_linear(x, (linear,)) for linear in linears]
    assert torch.equal(torch.cat(one_by_one, dim=1), found)


@DTYPES
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (1, 100, 7), (2, 16, 5), (3, 33, 4), (30, 40, 11)])
@torch.inference_mode()
def test_int8_weights(variant: engine.Engine, M: int, K: int, N: int, dtype: torch.dtype) -> None:
    """Round weights of two linears side by side; what is not rounded stays as exact as ever."""
    x = torch.randn(M, K).to(dtype)
    linears = tuple((torch.randn(n, K).to(dtype), torch.randn(n).to(dtype)) for n in (N, 3))
    stored, scale = packed.quantised(torch.cat([weight for weight, _ in linears]).float(), pairs=False)
    exact = F.linear(x.double(), stored.double() * scale.double()[:, None], torch.cat([bias for _, bias in linears]).double())
    found = cpu_chain.int8_weights_linear(x, linears)
    assert found is not None
    assert found.dtype == dtype
    assert error(found, exact) <= error(exact.to(dtype), exact) + 1e-6
    torch.set_num_threads(3)
    assert torch.equal(cpu_chain.int8_weights_linear(x[-1:], linears), found[-1:])
    linears[1][0].data.mul_(2)
    assert error(cpu_chain.int8_weights_linear(x, linears), exact) > 1e-2


@torch.inference_mode()
def test_int8_weights_of_other_kinds(native: engine.Engine) -> None:
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    expected = cpu_chain.int8_weights_linear(x, ((weight, bias),))
    assert expected is not None
    assert torch.equal(cpu_chain.int8_weights_linear(x, ((weight.T.contiguous().T, bias),)), expected)
    for others in ((x[:0], weight, bias), (x[None], weight, bias), (x, weight, bias.bfloat16()), (x, torch.randn(3, 9), bias)):
        assert cpu_chain.int8_weights_linear(others[0], (others[1:],)) is None
        assert cpu_chain.int8_weights_linear(others[0], ((weight, bias), others[1:])) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_chain.int8_weights_linear(x, ((weight, bias),)) is None
    with torch.enable_grad():
        assert cpu_chain.int8_weights_linear(x, ((weight, bias),)) is None


@torch.inference_mode()
def test_few_rows_that_it_leaves(native: engine.Engine) -> None:
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    assert cpu_chain.grouped_linear(x, ((weight, bias),)) is not None
    for others in (
        (torch.randn(17, 8), weight, bias),
        (x[:0], weight, bias),
        (x[None], weight, bias),
        (x, torch.randn(8, 3).T, bias),
        (x, weight, torch.randn(6)[::2]),
        (x, weight, bias.bfloat16()),
        (x, torch.randn(3, 9), bias),
    ):
        assert cpu_chain.grouped_linear(others[0], (others[1:],)) is None
        assert cpu_chain.grouped_linear(others[0], ((weight, bias), others[1:])) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_chain.grouped_linear(x, ((weight, bias),)) is None
