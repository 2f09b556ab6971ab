"""Elementwise kernels: arithmetic, transcendental functions, random numbers, scalar arguments."""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

import ptxsim
from ptxsim.sample_kernels import add_kernel, close


@pytest.mark.parametrize("n", [1, 33, 4096, 100003])
@pytest.mark.parametrize("dt", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_addition_and_its_traffic(n, dt):
    x, y = torch.randn(n, dtype=dt), torch.randn(n, dtype=dt)
    big = torch.full((n + 64,), 7.0, dtype=dt)
    o = big[:n]
    with ptxsim.record() as st:
        add_kernel[(triton.cdiv(n, 1024),)](x, y, o, n, B=1024)
    assert torch.equal(o, x + y)
    assert (big[n:] == 7).all()
    s = st["add_kernel"]
    es = x.element_size()
    assert s.global_load_bytes == 2 * n * es
    assert s.global_store_bytes == n * es
    assert abs(s.unique_sectors_read - 2 * n * es / 32) <= 4
    assert abs(s.unique_sectors_written - n * es / 32) <= 2


@triton.jit
def int_kernel(x, y, o, n, B: tl.constexpr):
    p = tl.program_id(0) * B + tl.arange(0, B)
    m = p < n
    a = tl.load(x + p, mask=m, other=1)
    b = tl.load(y + p, mask=m, other=1)
    tl.store(o + p, a // b, mask=m)
    tl.store(o + n + p, a % b, mask=m)
    tl.store(o + 2 * n + p, (a ^ b) + (a & 0x55) - (b | 3), mask=m)
    tl.store(o + 3 * n + p, (a >> 3) + (a << 2), mask=m)
    tl.store(o + 4 * n + p, tl.maximum(a, b) * tl.minimum(a, b), mask=m)
    tl.store(o + 5 * n + p, tl.where(a < b, -a, ~b), mask=m)
    tl.store(o + 6 * n + p, tl.abs(a) + a // 7 + a % 13, mask=m)


@pytest.mark.parametrize("dt", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integer_arithmetic(dt):
    n = 777
    lo, hi = (
        (0, 255)
        if dt == torch.uint8
        else (-120, 120)
        if dt == torch.int8
        else (-30000, 30000)
        if dt == torch.int16
        else (-(2**31), 2**31 - 1)
    )
    x = torch.randint(lo, hi, (n,), dtype=torch.int64).to(dt)
    y = torch.randint(1, 100, (n,), dtype=torch.int64).to(dt)
    o = torch.zeros(7, n, dtype=dt)
    int_kernel[(4,)](x, y, o, n, B=256)
    a, b = x.clone(), y.clone()

    def truncated(u, v):
        return torch.div(u, v, rounding_mode="trunc")

    if dt != torch.uint8:
        assert torch.equal(o[0], truncated(a, b))
        assert torch.equal(o[1], a - truncated(a, b) * b)
        assert torch.equal(o[5], torch.where(a < b, -a, ~b))
        assert torch.equal(o[6], a.abs() + truncated(a, torch.tensor(7, dtype=dt)) + torch.fmod(a, 13))
    assert torch.equal(o[2], (a ^ b) + (a & 0x55) - (b | 3))
    assert torch.equal(o[3], (a >> 3) + (a << 2))
    assert torch.equal(o[4], torch.maximum(a, b) * torch.minimum(a, b))


@triton.jit
def math_kernel(x, o, n: tl.constexpr):
    p = tl.arange(0, n)
    v = tl.load(x + p)
    a = tl.abs(v) + 0.5
    tl.store(o + 0 * n + p, tl.exp(v))
    tl.store(o + 1 * n + p, tl.log(a))
    tl.store(o + 2 * n + p, tl.sin(v))
    tl.store(o + 3 * n + p, tl.cos(v))
    tl.store(o + 4 * n + p, libdevice.tanh(v))
    tl.store(o + 5 * n + p, tl.sigmoid(v))
    tl.store(o + 6 * n + p, tl.erf(v))
    tl.store(o + 7 * n + p, libdevice.pow(a, v))
    tl.store(o + 8 * n + p, tl.math.rsqrt(a))
    tl.store(o + 9 * n + p, tl.sqrt(a))
    tl.store(o + 10 * n + p, tl.math.exp2(v))
    tl.store(o + 11 * n + p, tl.math.log2(a))
    tl.store(o + 12 * n + p, tl.floor(v))
    tl.store(o + 13 * n + p, tl.ceil(v))
    tl.store(o + 14 * n + p, tl.math.div_rn(v, a))
    tl.store(o + 15 * n + p, tl.math.sqrt_rn(a))
    tl.store(o + 16 * n + p, libdevice.atan2(v, a))
    tl.store(o + 17 * n + p, libdevice.log1p(a))
    tl.store(o + 18 * n + p, libdevice.expm1(v))
    tl.store(o + 19 * n + p, libdevice.rint(v))
    tl.store(o + 20 * n + p, tl.fma(v, a, v))
    tl.store(o + 21 * n + p, libdevice.trunc(v))


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_transcendental_functions(scale):
    n = 1024
    x = (torch.randn(n) * scale).clamp(-20, 20)
    o = torch.zeros(22, n)
    math_kernel[(1,)](x, o, n=n)
    v = x.double()
    a = (x.abs() + 0.5).double()
    f = [
        v.exp(),
        a.log(),
        v.sin(),
        v.cos(),
        v.tanh(),
        v.sigmoid(),
        torch.erf(v),
        a.pow(v),
        a.rsqrt(),
        a.sqrt(),
        v.exp2(),
        a.log2(),
        v.floor(),
        v.ceil(),
        v / a,
        a.sqrt(),
        torch.atan2(v, a),
        a.log1p(),
        v.expm1(),
        v.round(),
        v * a + v,
        v.trunc(),
    ]
    for k, r in enumerate(f):
        rel = ((o[k].double() - r).abs() / (r.abs() + 1e-3)).max().item()
        assert rel < 2e-5, (k, rel)


def test_sine_of_large_arguments():  # Payne-Hanek path: local memory, carries, divergent branches
    n = 1024
    x = torch.randn(n) * 1e7
    o = torch.zeros(22, n)
    math_kernel[(1,)](x, o, n=n)
    close(o[2], x.double().sin(), 2e-6)
    close(o[3], x.double().cos(), 2e-6)


@triton.jit
def random_kernel(o, seed, B: tl.constexpr):
    p = tl.arange(0, B)
    tl.store(o + p, tl.rand(seed, p))
    tl.store(o + B + p, tl.randn(seed, p))


def test_random_numbers():
    o = torch.zeros(2, 4096)
    random_kernel[(1,)](o, 42, B=4096)
    assert o[0].min() >= 0
    assert o[0].max() < 1
    assert abs(o[0].mean() - 0.5) < 0.03
    assert abs(o[1].mean()) < 0.08
    assert abs(o[1].std() - 1) < 0.05


@triton.jit
def scalar_arguments_kernel(o, i8, i32, i64, f, h: tl.float16, flag):
    tl.store(o, i8 + i32 + i64.to(tl.float32) * 0 + f + h)
    if flag:
        tl.store(o + 1, 5.0)


def test_scalar_arguments():
    o = torch.zeros(2)
    scalar_arguments_kernel[(1,)](o, -3, 100000, 2**40, 0.5, 0.25, True)
    assert o.tolist() == [99997.75, 5.0]
