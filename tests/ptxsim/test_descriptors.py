"""Tensor descriptors: TMA, mbarriers and wgmma on sm_90, pointers on sm_80."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import ptxsim
from ptxsim.sample_kernels import close

ARCH = pytest.mark.parametrize("arch", [80, 86, 89, 90])


@pytest.fixture(autouse=True)
def _scratch_allocator():
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))


@triton.jit
def double_device_kernel(a, o, M, N, BM: tl.constexpr, BN: tl.constexpr):
    a_desc = tl.make_tensor_descriptor(a, [M, N], [N, 1], [BM, BN])
    o_desc = tl.make_tensor_descriptor(o, [M, N], [N, 1], [BM, BN])
    i, j = tl.program_id(0) * BM, tl.program_id(1) * BN
    o_desc.store([i, j], a_desc.load([i, j]) * 2)


@ARCH
def test_device_made_descriptors(arch):
    a, o = torch.randn(50, 64), torch.zeros(50, 64)
    double_device_kernel[(2, 2)](a, o, 50, 64, 32, 32)
    assert torch.equal(o, 2 * a)


@triton.jit
def double_host_kernel(a, o, BM: tl.constexpr, BN: tl.constexpr):
    i, j = tl.program_id(0) * BM, tl.program_id(1) * BN
    o.store([i, j], a.load([i, j]) * 2)


@ARCH
def test_host_made_descriptors(arch):
    a, o = torch.randn(50, 64), torch.zeros(50, 64)
    double_host_kernel[(2, 2)](*(TensorDescriptor.from_tensor(t, [32, 32]) for t in (a, o)), 32, 32)
    assert torch.equal(o, 2 * a)


@triton.jit
def descriptor_matmul_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([pm * BM, k]), b.load([pn * BN, k]).T, acc)
    c.store([pm * BM, pn * BN], acc.to(c.dtype))


@triton.jit
def device_descriptor_matmul_kernel(ap, bp, cp, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    a = tl.make_tensor_descriptor(ap, [M, K], [K, 1], [BM, BK])
    b = tl.make_tensor_descriptor(bp, [K, N], [N, 1], [BK, BN])
    c = tl.make_tensor_descriptor(cp, [M, N], [N, 1], [BM, BN])
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([pm * BM, k]), b.load([k, pn * BN]), acc)
    c.store([pm * BM, pn * BN], acc.to(cp.dtype.element_ty))


@pytest.mark.parametrize(("nw", "stages"), [(4, 1), (4, 3), (8, 4)])
@pytest.mark.parametrize("dt", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [80, 90])
def test_descriptor_matmul(arch, dt, nw, stages):
    M, N, K = 96, 160, 112
    a, b, c = torch.randn(M, K).to(dt), torch.randn(N, K).to(dt), torch.zeros(M, N, dtype=dt)
    BK = 32 if dt == torch.float32 else 64
    descriptors = [TensorDescriptor.from_tensor(t, [64, n]) for t, n in ((a, BK), (b, BK), (c, 64))]
    descriptor_matmul_kernel[(2, 3)](*descriptors, K, 64, 64, BK, num_warps=nw, num_stages=stages)
    close(c, a.double() @ b.double().t(), 5e-3)
    bt, c2 = b.t().contiguous(), torch.zeros(M, N, dtype=dt)
    device_descriptor_matmul_kernel[(2, 3)](a, bt, c2, M, N, K, 64, 64, BK, num_warps=nw, num_stages=stages)
    close(c2, a.double() @ b.double().t(), 5e-3)


@triton.jit
def warp_specialized_matmul_kernel(a, b, c, M, N, K, NP, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    nt = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), nt, NP, warp_specialize=True):
        pm = t // tl.cdiv(N, BN)
        pn = t % tl.cdiv(N, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(a.load([pm * BM, k]), b.load([pn * BN, k]).T, acc)
        c.store([pm * BM, pn * BN], acc.to(c.dtype))


def test_warp_specialized():
    ptxsim.install(90)
    M, N, K = 128, 128, 192
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.zeros(M, N).bfloat16()
    with ptxsim.set_options(max_instr=1 << 22, slice=1 << 14):
        descriptors = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c)]
        warp_specialized_matmul_kernel[(2,)](*descriptors, M, N, K, 2, 64, 64, 64, num_stages=3)
    close(c, a.double() @ b.double().t(), 5e-3)


@triton.jit
def descriptor_add_kernel(d, B: tl.constexpr):
    d.atomic_add([0, 0], tl.full((16, B), 1.0, tl.float32))


@pytest.mark.parametrize("arch", [80, 90])
def test_descriptor_atomic(arch):
    o = torch.zeros(20, 40)
    descriptor_add_kernel[(3,)](TensorDescriptor.from_tensor(o, [16, 32]), 32)
    assert (o[:16, :32] == 3).all()
    assert o.sum() == 3 * 16 * 32


@triton.jit
def descriptor_outside_kernel(d, o, BM: tl.constexpr, BN: tl.constexpr):
    v = d.load([-8, 24])
    tl.store(o + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], v)


@pytest.mark.parametrize("arch", [80, 90])
def test_descriptor_zero_fill(arch):
    a, o = torch.randn(20, 40), torch.full((32, 32), 9.0)
    descriptor_outside_kernel[(1,)](TensorDescriptor.from_tensor(a, [32, 32]), o, 32, 32)
    r = torch.zeros(32, 32)
    r[8:28, :16] = a[:, 24:]
    assert torch.equal(o, r)
