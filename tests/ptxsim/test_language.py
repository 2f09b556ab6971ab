"""Breadth of the Triton language, on several targets."""

import pytest
import torch
import triton
import triton.language as tl

import ptxsim
from ptxsim.sample_kernels import close

ARCH = pytest.mark.parametrize("arch", [80, 86, 89, 90])


@triton.jit
def gather_kernel(x, i, o, N: tl.constexpr):
    p = tl.arange(0, N)
    tl.store(o + p, tl.gather(tl.load(x + p), tl.load(i + p), 0))


@ARCH
def test_gather(arch):
    x = torch.randn(256)
    i = torch.randint(0, 256, (256,), dtype=torch.int32)
    o = torch.zeros(256)
    gather_kernel[(1,)](x, i, o, 256)
    assert torch.equal(o, x[i.long()])


@triton.jit
def histogram_kernel(x, o, N: tl.constexpr, B: tl.constexpr):
    tl.store(o + tl.arange(0, B), tl.histogram(tl.load(x + tl.arange(0, N)), B))


@ARCH
def test_histogram(arch):
    x = torch.randint(0, 64, (1024,), dtype=torch.int32)
    o = torch.zeros(64, dtype=torch.int32)
    histogram_kernel[(1,)](x, o, 1024, 64)
    assert torch.equal(o.long(), torch.bincount(x.long(), minlength=64))


@triton.jit
def combine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def associative_scan_kernel(x, y, o, N: tl.constexpr, M: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    _, b = tl.associative_scan((tl.load(x + i), tl.load(y + i)), 1, combine)
    tl.store(o + i, b)


@ARCH
def test_associative_scan(arch):
    for nw in (1, 4, 8):
        M, N = 4, 128
        x = torch.rand(M, N)
        y = torch.randn(M, N)
        o = torch.zeros(M, N)
        associative_scan_kernel[(1,)](x, y, o, N, M, num_warps=nw)
        h = torch.zeros(M, dtype=torch.float64)
        r = []
        for t in range(N):
            h = h * x[:, t].double() + y[:, t].double()
            r.append(h)
        close(o, torch.stack(r, 1))


@triton.jit
def welford(m1, s1, n1, m2, s2, n2):
    d = m2 - m1
    n = n1 + n2
    w = tl.where(n == 0.0, 0.0, n2 / n)
    return m1 + d * w, s1 + s2 + d * d * n1 * w, n


@triton.jit
def custom_reduce_kernel(x, o, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, N))
    m, s, n = tl.reduce((v, tl.zeros_like(v), tl.full((N,), 1.0, tl.float32)), 0, welford)
    tl.store(o, m)
    tl.store(o + 1, s / n)


@ARCH
def test_custom_reduce(arch):
    x = torch.randn(1024)
    o = torch.zeros(2)
    custom_reduce_kernel[(1,)](x, o, 1024)
    close(o, torch.stack([x.double().mean(), x.double().var(unbiased=False)]))


@triton.jit
def join_kernel(x, y, o, N: tl.constexpr):
    p = tl.arange(0, N)
    a = tl.load(x + p)
    b = tl.load(y + p)
    j = tl.join(a, b)
    tl.store(o + p[:, None] * 2 + tl.arange(0, 2)[None, :], j)
    u, v = tl.split(j)
    tl.store(o + 2 * N + p, u + v)
    tl.store(o + 3 * N + tl.arange(0, 2 * N), tl.interleave(a, b))
    tl.store(o + 5 * N + p, tl.flip(a, 0))
    tl.store(o + 6 * N + p, tl.reshape(tl.trans(tl.reshape(a, (16, N // 16))), (N,)))


@ARCH
def test_join_split(arch):
    N = 128
    x = torch.randn(N)
    y = torch.randn(N)
    o = torch.zeros(7 * N)
    join_kernel[(1,)](x, y, o, N)
    j = torch.stack([x, y], 1)
    assert torch.equal(o[: 2 * N], j.reshape(-1))
    assert torch.equal(o[2 * N : 3 * N], x + y)
    assert torch.equal(o[3 * N : 5 * N], j.reshape(-1))
    assert torch.equal(o[5 * N : 6 * N], x.flip(0))
    assert torch.equal(o[6 * N :], x.view(16, -1).t().reshape(-1))


@triton.jit(noinline=True)
def helper(x, y):
    z = x * y + 3
    if z > 10:
        z = z - 100
    return z


@triton.jit
def noinline_kernel(x, o, N: tl.constexpr):
    p = tl.arange(0, N)
    v = tl.load(x + p)
    s = tl.sum(v, 0)
    tl.store(o + p, v + helper(s, s + 1) + helper(s, 2.0))


@ARCH
def test_noinline(arch):
    x = torch.randn(256)
    o = torch.zeros(256)
    noinline_kernel[(1,)](x, o, 256)
    s = x.sum()

    def expected(x, y):
        z = x * y + 3
        return z - 100 if z > 10 else z

    close(o, x + expected(s, s + 1) + expected(s, 2))


@triton.jit
def inline_asm_kernel(x, o, N: tl.constexpr):
    p = tl.arange(0, N)
    v = tl.load(x + p)
    tl.store(
        o + p,
        tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 2; add.s32 $0, t, 5; }", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1
        ),
    )


@ARCH
def test_inline_asm(arch):
    x = torch.randint(0, 100, (256,), dtype=torch.int32)
    o = torch.zeros_like(x)
    inline_asm_kernel[(1,)](x, o, 256)
    assert torch.equal(o, x * 4 + 5)


@triton.jit
def all_atomics_kernel(i, f, N: tl.constexpr):
    p = tl.arange(0, N)
    tl.atomic_and(i + p, 12)
    tl.atomic_or(i + p, 3)
    tl.atomic_xor(i + p, 5)
    tl.atomic_min(i + p, p)
    tl.atomic_max(i + p, 2)
    o = tl.atomic_xchg(i + p, p)
    tl.atomic_cas(i + p, p, o + p)
    tl.atomic_max(f + p, p.to(tl.float32))
    tl.atomic_min(f + p, 50.0)


@ARCH
def test_atomics_all(arch):
    i = torch.randint(0, 100, (128,), dtype=torch.int32)
    f = torch.randn(128)
    p = torch.arange(128, dtype=torch.int32)
    r = torch.minimum(((i & 12) | 3) ^ 5, p).clamp(min=2) + p
    g = torch.maximum(f, p.float()).clamp(max=50)
    all_atomics_kernel[(1,)](i, f, 128)
    assert torch.equal(i, r)
    assert torch.equal(f, g)


@triton.jit
def atomic_half_kernel(x, o, N: tl.constexpr):
    p = tl.arange(0, N)
    tl.atomic_add(o + p // 2, tl.load(x + p))


@ARCH
def test_atomic_half(arch):
    for dt in (torch.float16, torch.bfloat16):
        x = torch.randn(256).to(dt)
        o = torch.zeros(128, dtype=dt)
        atomic_half_kernel[(1,)](x, o, 256)
        close(o, x.view(-1, 2).sum(1), 1e-2)


@triton.jit
def tuple_kernel(t, N: tl.constexpr):
    p = tl.arange(0, N)
    tl.store(t[1] + p, tl.load(t[0] + p) * t[2])


@ARCH
def test_tuple_args(arch):
    x = torch.randn(64)
    o = torch.zeros(64)
    tuple_kernel[(1,)]((x, o, 3.0), 64)
    close(o, x * 3)


@triton.jit
def pointers_kernel(pt, o, N: tl.constexpr):
    p = tl.arange(0, N)
    a = tl.load(pt + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(o + tl.program_id(0) * N + p, tl.load(a + p))


@ARCH
def test_pointer_array(arch):
    a = torch.randn(64)
    b = torch.randn(64)
    o = torch.zeros(2, 64)
    pt = torch.tensor([a.data_ptr(), b.data_ptr()])
    pointers_kernel[(2,)](pt, o, 64)
    assert torch.equal(o, torch.stack([a, b]))
    with pytest.raises(ptxsim.SimError, match="out-of-bounds global load"):
        pointers_kernel[(2,)](pt, torch.zeros(2, 128), 128)
    address = pt[1].item()
    del b
    pt[1] = address
    with pytest.raises(ptxsim.SimError, match="out-of-bounds global load"):
        pointers_kernel[(2,)](pt, o, 64)


@triton.jit
def topk_kernel(x, o, M: tl.constexpr, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    s = tl.softmax(v)
    t = tl.topk(v, 16)
    tl.store(o + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tl.sort(s, descending=True))
    tl.store(o + M * N + tl.arange(0, M)[:, None] * 16 + tl.arange(0, 16)[None, :], t)


@ARCH
def test_topk_and_sort(arch):
    M, N = 8, 64
    x = torch.randn(M, N)
    o = torch.zeros(M * N + M * 16)
    topk_kernel[(1,)](x, o, M, N)
    assert torch.equal(o[M * N :].view(M, 16), x.topk(16, 1).values)


@triton.jit
def persistent_matmul_kernel(a, b, c, M, N, K, NP, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    nt = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), nt, NP, flatten=True):
        pm = t // tl.cdiv(N, BN)
        pn = t % tl.cdiv(N, BN)
        rm = pm * BM + tl.arange(0, BM)
        rn = pn * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            rk = k * BK + tl.arange(0, BK)
            x = tl.load(a + rm[:, None] * K + rk[None, :], mask=rk[None, :] < K, other=0.0)
            y = tl.load(b + rk[:, None] * N + rn[None, :], mask=rk[:, None] < K, other=0.0)
            acc = tl.dot(x, y, acc)
        tl.store(c + rm[:, None] * N + rn[None, :], acc)


@ARCH
def test_persistent_matmul(arch):
    M, N, K = 128, 128, 96
    a = torch.randn(M, K).half()
    b = torch.randn(K, N).half()
    c = torch.zeros(M, N)
    persistent_matmul_kernel[(3,)](a, b, c, M, N, K, 3, 64, 32, 32, num_stages=3)
    close(c, a.double() @ b.double())
