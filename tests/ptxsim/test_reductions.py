"""Reductions, scans, sorts and transposes: what goes through shuffles and shared memory."""

import pytest
import torch
import triton
import triton.language as tl

from ptxsim.sample_kernels import close, layernorm_kernel, softmax_kernel, transpose_kernel


@pytest.mark.parametrize("nw", [1, 4, 8])
@pytest.mark.parametrize("N", [17, 128, 1000])
def test_softmax(N, nw):
    x = torch.randn(5, N)
    o = torch.zeros_like(x)
    softmax_kernel[(5,)](x, o, N, B=triton.next_power_of_2(N), num_warps=nw)
    close(o, x.double().softmax(-1), 1e-6)


@pytest.mark.parametrize("nw", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16, torch.float16])
def test_layernorm(dt, nw):
    for R, N in [(3, 1024), (4, 768), (2, 100)]:
        x, w, b = (torch.randn(R, N) * 2 + 1).to(dt), torch.randn(N).to(dt), torch.randn(N).to(dt)
        o, mean, rstd = torch.zeros_like(x), torch.zeros(R), torch.zeros(R)
        layernorm_kernel[(R,)](x, w, b, o, mean, rstd, N, 1e-5, B=triton.next_power_of_2(N), num_warps=nw)
        ref = torch.nn.functional.layer_norm(x.double(), (N,), w.double(), b.double(), 1e-5)
        close(o, ref, {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dt])
        close(mean, x.double().mean(-1), 1e-6)


@triton.jit
def reduce_2d_kernel(x, o0, o1, am, M: tl.constexpr, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(o0 + tl.arange(0, N), tl.sum(v, 0))
    tl.store(o1 + tl.arange(0, M), tl.max(v, 1))
    tl.store(am + tl.arange(0, M), tl.argmin(v, 1))


@pytest.mark.parametrize("nw", [1, 4, 8])
def test_reductions_of_both_axes(nw):
    x = torch.randn(32, 64)
    o0, o1, am = torch.zeros(64), torch.zeros(32), torch.zeros(32, dtype=torch.int32)
    reduce_2d_kernel[(1,)](x, o0, o1, am, 32, 64, num_warps=nw)
    close(o0, x.double().sum(0), 1e-6)
    assert torch.equal(o1, x.max(1).values)
    assert torch.equal(am.long(), x.argmin(1))


@triton.jit
def scan_kernel(x, o, s, N: tl.constexpr, M: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + i)
    tl.store(o + i, tl.cumsum(v, 1))
    tl.store(s + i, tl.sort(v))


@pytest.mark.parametrize("nw", [1, 4])
def test_cumsum_and_sort(nw):
    x = torch.randn(4, 256)
    o, s = torch.zeros_like(x), torch.zeros_like(x)
    scan_kernel[(1,)](x, o, s, 256, 4, num_warps=nw)
    close(o, x.double().cumsum(1), 1e-5)
    assert torch.equal(s, x.sort(1).values)


@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16, torch.int8])
def test_transpose(dt):
    x = (torch.randn(64, 128) * 20).to(dt)
    o = torch.zeros(128, 64, dtype=dt)
    transpose_kernel[(1,)](x, o, 64, 128)
    assert torch.equal(o, x.t())
