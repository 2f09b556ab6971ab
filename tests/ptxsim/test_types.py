"""Casts, 8- and 16-bit floats, float64, libdevice, products of every type, on several targets."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ptxsim.sample_kernels import close

ARCH = pytest.mark.parametrize("arch", [80, 86, 89, 90])
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@triton.jit
def cast_kernel(x, o, N: tl.constexpr):
    p = tl.arange(0, N)
    tl.store(o + p, tl.load(x + p).to(o.dtype.element_ty))


@ARCH
def test_casts_between_all_types(arch):

    D = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    for a, b in itertools.product(D, D):
        x = (torch.randn(512) * 50).to(a) if a != torch.uint8 else torch.randint(0, 200, (512,)).to(a)
        if b == torch.uint8:
            x = x.abs() if a not in (torch.bool, torch.uint8) else x
        o = torch.zeros(512, dtype=b)
        cast_kernel[(1,)](x, o, 512)
        assert torch.equal(o, x.to(b)), (a, b, (o != x.to(b)).sum(), x[o != x.to(b)][:4], o[o != x.to(b)][:4])


@ARCH
def test_fp8_casts(arch):
    F = [torch.float8_e5m2] + ([torch.float8_e4m3fn] if arch >= 89 else [])
    for f in F:
        for b in (torch.float32, torch.float16, torch.bfloat16):
            x = (torch.randn(512) * 5).to(b)
            o = torch.zeros(512, dtype=f)
            cast_kernel[(1,)](x, o, 512)
            r = x.to(f)
            if f == torch.float8_e5m2 and (
                arch < 90 or TRITON < (3, 7)
            ):  # Triton's own code, not an instruction: some versions round through fp16, ties away from zero
                assert ((o.float() - x.float()).abs() <= (r.float() - x.float()).abs() + x.float().abs() * 2**-9).all(), (f, b)
            else:
                assert torch.equal(o.view(torch.uint8), r.view(torch.uint8)), (f, b)
            y = torch.zeros(512, dtype=b)
            cast_kernel[(1,)](r, y, 512)
            assert torch.equal(y, r.to(b)), (f, b)


@triton.jit
def libdevice_kernel(x, o, N: tl.constexpr):
    p = tl.arange(0, N)
    v = tl.load(x + p)
    a = tl.abs(v) + 0.1
    tl.store(o + p, libdevice.erfc(v))
    tl.store(o + N + p, libdevice.lgamma(a))
    tl.store(o + 2 * N + p, libdevice.atan(v))
    tl.store(o + 3 * N + p, libdevice.asinh(v))
    tl.store(o + 4 * N + p, libdevice.cbrt(v))
    tl.store(o + 5 * N + p, libdevice.fmod(v, a))
    tl.store(o + 6 * N + p, libdevice.hypot(v, a))
    tl.store(o + 7 * N + p, libdevice.tan(v))
    tl.store(o + 8 * N + p, libdevice.sinh(v))
    tl.store(o + 9 * N + p, libdevice.fast_expf(v))
    tl.store(o + 10 * N + p, libdevice.nearbyint(v * 3))
    tl.store(o + 11 * N + p, libdevice.copysign(a, v))
    tl.store(o + 12 * N + p, libdevice.exp10(v))
    tl.store(o + 13 * N + p, libdevice.rsqrt(a))
    tl.store(o + 14 * N + p, libdevice.erfinv(v * 0.2))
    tl.store(o + 15 * N + p, libdevice.acos(v * 0.2))


@ARCH
def test_libdevice(arch):
    N = 512
    x = torch.randn(N).clamp(-4, 4)
    o = torch.zeros(16, N)
    libdevice_kernel[(1,)](x, o, N)
    v = x.double()
    a = (x.abs() + 0.1).double()
    for k, r in enumerate(
        [
            torch.erfc(v),
            torch.lgamma(a),
            v.atan(),
            v.asinh(),
            v.sign() * v.abs() ** (1 / 3),
            torch.fmod(v, a),
            torch.hypot(v, a),
            v.tan(),
            v.sinh(),
            v.exp(),
            (x * 3).round().double(),
            torch.copysign(a, v),
            10**v,
            a.rsqrt(),
            torch.erfinv((x * 0.2).double()),
            (x * 0.2).double().acos(),
        ]
    ):
        e = ((o[k].double() - r).abs() / (r.abs() + 1e-2)).max().item()
        assert e < 1e-4, (k, e)


@triton.jit
def float64_kernel(x, o, N: tl.constexpr):
    p = tl.arange(0, N)
    v = tl.load(x + p)
    tl.store(o + p, tl.exp(v))
    tl.store(o + N + p, tl.log(tl.abs(v) + 1))
    tl.store(o + 2 * N + p, tl.sin(v))
    tl.store(o + 3 * N + p, tl.sqrt(tl.abs(v)))
    tl.store(o + 4 * N + p, v / (tl.abs(v) + 1))
    tl.store(o + 5 * N + p, tl.cumsum(v, 0))
    tl.store(o + 6 * N + p, libdevice.pow(tl.abs(v), tl.abs(v) + 1))
    tl.store(o + 7 * N + p, libdevice.tanh(v))


@ARCH
def test_float64_functions(arch):
    N = 256
    x = torch.randn(N, dtype=torch.float64)
    o = torch.zeros(8, N, dtype=torch.float64)
    float64_kernel[(1,)](x, o, N)
    a = x.abs()
    for k, r in enumerate([x.exp(), (a + 1).log(), x.sin(), a.sqrt(), x / (a + 1), x.cumsum(0), a ** (a + 1), x.tanh()]):
        close(o[k], r, 1e-12)


@triton.jit
def half_kernel(x, y, o, N: tl.constexpr):
    p = tl.arange(0, N)
    a = tl.load(x + p)
    b = tl.load(y + p)
    tl.store(o + p, a * b + a)
    tl.store(o + N + p, tl.maximum(a, b) - tl.minimum(a, b))
    tl.store(o + 2 * N + p, tl.where(a > b, -a, tl.abs(b)))
    tl.store(o + 3 * N + p, tl.sum(a * b, 0).to(a.dtype))
    tl.store(o + 4 * N + p, a / b)


@ARCH
def test_half_arithmetic(arch):
    for dt, tol in ((torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
        N = 512
        x = torch.randn(N).to(dt)
        y = torch.randn(N).to(dt)
        o = torch.zeros(5, N, dtype=dt)
        half_kernel[(1,)](x, y, o, N)
        a, b = x.double(), y.double()
        close(o[0], a * b + a, tol)
        close(o[1], torch.maximum(a, b) - torch.minimum(a, b), tol)
        assert torch.equal(o[2], torch.where(x > y, -x, y.abs()))
        close(o[3], (a * b).sum().expand(N), tol * 4)
        close(o[4] / (a / b), torch.ones(N), tol)


@triton.jit
def nan_kernel(x, o, N: tl.constexpr):
    p = tl.arange(0, N)
    v = tl.load(x + p)
    tl.store(o + p, tl.clamp(v, -1.0, 1.0))
    tl.store(o + N + p, tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(o + 2 * N + p, (v != v).to(tl.float32))
    tl.store(o + 3 * N + p, libdevice.isinf(v).to(tl.float32))
    tl.store(o + 4 * N + p, tl.max(v, 0))


@ARCH
def test_nan_handling(arch):
    N = 128
    x = torch.randn(N) * 2
    x[3] = float("nan")
    x[5] = float("inf")
    o = torch.zeros(5, N)
    nan_kernel[(1,)](x, o, N)
    assert o[1].isnan().sum() == 1
    assert o[2].sum() == 1
    assert o[3].sum() == 1
    assert o[4, 0] == float("inf")


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(a + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(c + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tl.dot(x, y))


@ARCH
def test_dot_of_every_type(arch):
    for dt in (
        [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2]
        + ([torch.float8_e4m3fn] if arch >= 89 else [])
        + [torch.float64, torch.int8]
    ):
        for M, N, K in ((16, 16, 32), (64, 64, 64), (128, 32, 32)):
            a = (torch.randn(M, K) * (9 if dt == torch.int8 else 1)).to(dt)
            b = (torch.randn(K, N) * (9 if dt == torch.int8 else 1)).to(dt)
            c = torch.zeros(
                M, N, dtype=torch.int32 if dt == torch.int8 else torch.float64 if dt == torch.float64 else torch.float32
            )
            dot_kernel[(1,)](a, b, c, M, N, K)
            close(c, a.double() @ b.double(), 2e-3 if dt == torch.float32 else 1e-5)


@triton.jit
def mixed_dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(a + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :]).to(tl.bfloat16)
    y = tl.load(b + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :]).to(tl.bfloat16)
    s = tl.dot(x, y)
    s = tl.dot(s.to(tl.bfloat16), tl.trans(y))
    tl.store(c + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :], s)


@ARCH
def test_mixed_dot(arch):
    M, N, K = 32, 64, 64
    a = torch.randint(-5, 5, (M, K), dtype=torch.int8)
    b = torch.randint(-5, 5, (K, N), dtype=torch.int8)
    c = torch.zeros(M, K)
    mixed_dot_kernel[(1,)](a, b, c, M, N, K)
    close(c, (a.double() @ b.double()).bfloat16().double() @ b.double().t(), 1e-5)


@triton.jit
def dot_scaled_kernel(a, sa, b, sb, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(a + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    s = tl.load(sa + tl.arange(0, M)[:, None] * (K // 32) + tl.arange(0, K // 32)[None, :])
    t = tl.load(sb + tl.arange(0, N)[:, None] * (K // 32) + tl.arange(0, K // 32)[None, :])
    tl.store(c + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tl.dot_scaled(x, s, "e5m2", y, t, "e5m2"))


@ARCH
def test_dot_scaled(arch):
    M, N, K = 32, 32, 64
    a = torch.randn(M, K).to(torch.float8_e5m2)
    b = torch.randn(K, N).to(torch.float8_e5m2)
    s = torch.randint(124, 130, (M, K // 32)).to(torch.uint8)
    t = torch.randint(124, 130, (N, K // 32)).to(torch.uint8)
    c = torch.zeros(M, N)
    dot_scaled_kernel[(1,)](a, s, b, t, c, M, N, K)
    A = a.double() * (2.0 ** (s.double() - 127)).repeat_interleave(32, 1)
    B = b.double() * (2.0 ** (t.double() - 127)).repeat_interleave(32, 1).t()
    close(c, A @ B, 1e-4)
