"""Grids, atomics, loops, orders of execution, the autotuner."""

import pytest
import torch
import triton
import triton.language as tl

import ptxsim
from ptxsim.sample_kernels import close, matmul_kernel, run_matmul


@triton.jit
def atomics_kernel(x, acc, cnt, mx, idx, n, B: tl.constexpr):
    p = tl.program_id(0) * B + tl.arange(0, B)
    m = p < n
    v = tl.load(x + p, mask=m, other=0.0)
    i = tl.load(idx + p, mask=m, other=0)
    tl.atomic_add(acc + i, v, mask=m)
    tl.atomic_add(cnt, 1)
    tl.atomic_max(mx + i, p, mask=m)


@pytest.mark.parametrize("threads", [1, 2])
def test_atomics(threads):
    n, nb = 5000, 16
    x, idx = torch.randn(n), torch.randint(0, nb, (n,), dtype=torch.int32)
    acc, cnt, mx = torch.zeros(nb), torch.zeros(1, dtype=torch.int32), torch.full((nb,), -1, dtype=torch.int32)
    with ptxsim.set_options(threads=threads):
        atomics_kernel[(triton.cdiv(n, 256),)](x, acc, cnt, mx, idx, n, B=256)
    ref = torch.zeros(nb, dtype=torch.float64).index_add_(0, idx.long(), x.double())
    close(acc, ref, 1e-5)
    assert cnt.item() == triton.cdiv(n, 256)
    assert torch.equal(mx.long(), torch.stack([torch.nonzero(idx == k).max() for k in range(nb)]))


@triton.jit
def atomic_add_one_kernel(o, B: tl.constexpr):
    tl.atomic_add(o + tl.arange(0, B), tl.full((B,), 1, tl.int32).to(o.dtype.element_ty))


@pytest.mark.parametrize("dt", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_atomic_dtypes(dt):
    o = torch.zeros(64, dtype=dt)
    atomic_add_one_kernel[(3,)](o, B=64)
    assert (o == 3).all()


@triton.jit
def lock_kernel(lock, x, n):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(x, tl.load(x) + tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def test_spin_lock():
    lock, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with ptxsim.set_options(check_race=False):
        lock_kernel[(10,)](lock, x, 1)
    assert x.item() == 45
    assert lock.item() == 0


@triton.jit
def grid_kernel(o, nx, ny, nz):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(o + (z * ny + y) * nx + x, x + 100 * y + 10000 * z + 1000000 * tl.num_programs(1))


def test_three_grid_axes():
    o = torch.zeros(4, 3, 5, dtype=torch.int32)
    grid_kernel[(5, 3, 4)](o, 5, 3, 4)
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(5), indexing="ij")
    assert torch.equal(o.long(), x + 100 * y + 10000 * z + 3000000)


@triton.jit
def collatz_kernel(x, o, n, B: tl.constexpr):
    p = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + p, mask=p < n, other=1)
    c = tl.zeros((B,), tl.int32)
    while tl.max(v, 0) > 1:
        odd = (v % 2) == 1
        c += (v > 1).to(tl.int32)
        v = tl.where(v > 1, tl.where(odd, 3 * v + 1, v // 2), v)
    tl.store(o + p, c, mask=p < n)


def test_data_dependent_loop():
    n = 300
    x = torch.arange(1, n + 1, dtype=torch.int32)
    o = torch.zeros_like(x)
    collatz_kernel[(triton.cdiv(n, 64),)](x, o, n, B=64, num_warps=2)

    def f(v):
        c = 0
        while v > 1:
            v = 3 * v + 1 if v % 2 else v // 2
            c += 1
        return c

    assert o.tolist() == [f(v) for v in range(1, n + 1)]


@triton.jit
def scalar_loop_kernel(x, cnt, o):
    pid = tl.program_id(0)
    n = tl.load(cnt + pid)
    s = 0.0
    for i in range(n):
        if i % 3 == 0:
            s += tl.load(x + i)
        else:
            s -= tl.load(x + i) * 2
    if n > 5:
        tl.store(o + pid, s)
    else:
        tl.store(o + pid, -1.0)


def test_scalar_loop():
    x, cnt = torch.randn(64), torch.randint(0, 20, (16,), dtype=torch.int32)
    o = torch.zeros(16)
    scalar_loop_kernel[(16,)](x, cnt, o)
    w = torch.where(torch.arange(64) % 3 == 0, 1.0, -2.0)
    ref = torch.stack([(x * w)[:c].sum() if c > 5 else torch.tensor(-1.0) for c in cnt.tolist()])
    close(o, ref, 1e-5)


@triton.autotune(configs=[triton.Config({"B": 128}, num_warps=1), triton.Config({"B": 512}, num_warps=4)], key=["n"])
@triton.heuristics({"EVEN": lambda a: a["n"] % a["B"] == 0})
@triton.jit
def tuned_kernel(x, o, n, B: tl.constexpr, EVEN: tl.constexpr):
    p = tl.program_id(0) * B + tl.arange(0, B)
    if EVEN:
        tl.store(o + p, tl.load(x + p) * 2)
    else:
        tl.store(o + p, tl.load(x + p, mask=p < n) * 2, mask=p < n)


@pytest.mark.parametrize("mode", ["first", "counters"])
@pytest.mark.parametrize("n", [1024, 1000])
def test_autotune(mode, n):
    tuned_kernel.cache.clear()
    x = torch.randn(n)
    o = torch.zeros(n)
    with ptxsim.set_options(autotune=mode), ptxsim.record() as st:
        tuned_kernel[lambda m: (triton.cdiv(n, m["B"]),)](x, o, n)
    assert torch.equal(o, 2 * x)
    assert st["tuned_kernel"].launches == (1 if mode == "first" else 3)
    if mode == "first":
        assert tuned_kernel.best_config.kwargs["B"] == 128


tuned_matmul = triton.autotune(
    configs=[
        triton.Config({"BM": 128, "BN": 128, "BK": 64}, num_stages=8),
        triton.Config({"BM": 64, "BN": 64, "BK": 32}, num_stages=3),
        triton.Config({"BM": 32, "BN": 32, "BK": 32}, num_stages=3),
    ],
    key=["M"],
)(matmul_kernel)


def test_autotune_skips_out_of_resources():
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64)
    with ptxsim.record() as st:
        tuned_matmul[lambda m: (triton.cdiv(64, m["BM"]), triton.cdiv(64, m["BN"]))](
            a, b, c, 64, 64, 64, *a.stride(), *b.stride(), *c.stride(), PREC="tf32", ACC=tl.float32
        )
    close(c, a.double() @ b.double(), 1e-6)
    assert st["matmul_kernel"].launches == 1
    assert tuned_matmul.best_config.kwargs["BM"] == 64


def test_order_of_execution_does_not_matter():
    a, b = torch.randn(130, 70).half(), torch.randn(70, 96).half()
    out = []
    for o in ("forward", "reverse", "random"):
        c = torch.zeros(130, 96)
        with ptxsim.set_options(cta_order=o, warp_order=o, seed=3, cp_async="late" if o == "forward" else "early"):
            run_matmul(a, b, c, 64, 64, 32, num_stages=3)
        out.append(c)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])
