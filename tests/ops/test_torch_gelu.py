"""GELU in plain torch: through a sigmoid where that is faster."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, assert_as_good_as
from torch import Tensor
from torch.nn import functional as F

from ditfast import ops
from ditfast.ops.torch_gelu import torch_gelu

pytestmark = pytest.mark.usefixtures("one_thread")


def library(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_parity(dtype: str, spread: float) -> None:
    x = (spread * torch.randn(3, 50, 70)).to(DTYPES[dtype]).transpose(1, 2)
    before = x.clone()
    assert_as_good_as(torch_gelu(x), library(x.double()), library(x))
    assert torch.equal(x, before)


def test_far_from_zero() -> None:
    x = torch.tensor([-1e30, -1e4, -50.0, -10.0, 0.0, 10.0, 50.0, 1e4, 1e30])
    torch.testing.assert_close(torch_gelu(x), library(x))


def test_half_precision_is_torchs() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(40, 50).to(dtype)
        assert torch.equal(torch_gelu(x), library(x))


def test_for_gradients_it_is_torchs() -> None:
    x = torch.randn(40, 50, requires_grad=True)
    assert torch.equal(torch_gelu(x), library(x))


def test_in_a_compiled_graph_it_is_torchs() -> None:
    x = torch.randn(40, 50)
    assert torch.equal(torch.compile(torch_gelu, fullgraph=True, backend="eager")(x), library(x))


def test_mlp_and_linear_gelu_take_it() -> None:
    x, weight, bias = torch.randn(1, 9, 64), torch.randn(64, 64) / 8, torch.randn(64)
    z = F.linear(x, weight, bias)
    assert not torch.equal(torch_gelu(z), library(z))
    assert torch.equal(ops.linear_gelu(x, weight, bias), torch_gelu(z))
    assert torch.equal(ops.mlp(x, weight, bias, weight, bias), F.linear(torch_gelu(z), weight, bias))
