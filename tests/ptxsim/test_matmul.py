"""Matrix products and attention, against float64."""

import pytest
import torch
import triton
import triton.language as tl

import ptxsim
from ptxsim.sample_kernels import attention_kernel, close, run_matmul


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dt", "prec", "tol"),
    [
        (torch.bfloat16, "tf32", 1e-6),
        (torch.float16, "tf32", 1e-6),
        (torch.float32, "tf32", 1.5e-3),
        (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32x3", 2e-6),
    ],
)
def test_matmul(dt, prec, tol, stages):
    M, N, K = 80, 96, 144
    a, b = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt)
    c = torch.zeros(M, N)
    with ptxsim.record() as st:
        run_matmul(a, b, c, 64, 64, 32, prec, num_stages=stages)
    close(c, a.double() @ b.double(), tol)
    s = st["matmul_kernel"]
    if prec == "tf32":
        assert s.mma_flops == 2 * 128 * 128 * 160
    if stages > 1 and prec != "ieee":
        assert s.by_class["cp.async"] > 0


@pytest.mark.parametrize("nw", [1, 2, 4, 8])
@pytest.mark.parametrize(("ta", "tb"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_matmul_layouts(nw, ta, tb):
    M, N, K = 64, 128, 96
    a = torch.randn(K, M).bfloat16().t() if ta else torch.randn(M, K).bfloat16()
    b = torch.randn(N, K).bfloat16().t() if tb else torch.randn(K, N).bfloat16()
    c = torch.zeros(M, N, dtype=torch.bfloat16)
    run_matmul(a, b, c, 32, 64, 32, num_stages=3, num_warps=nw)
    close(c, a.double() @ b.double(), 5e-3)


def test_matmul_with_fp16_accumulators():
    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    c = torch.zeros(64, 64, dtype=torch.float16)
    run_matmul(a, b, c, 64, 64, 32, acc=tl.float16)
    close(c, a.double() @ b.double(), 1e-2)


@triton.jit
def dot_transposed_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(a + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :])
    z = tl.dot(x, tl.trans(y))
    tl.store(c + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], z)


@pytest.mark.parametrize("dt", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_dot_transposed(dt):
    M, N, K = 32, 64, 64
    a, b = (
        (torch.randn(M, K) * (30 if dt == torch.int8 else 1)).to(dt),
        (torch.randn(N, K) * (30 if dt == torch.int8 else 1)).to(dt),
    )
    c = torch.zeros(M, N, dtype=torch.int32 if dt == torch.int8 else torch.float32)
    dot_transposed_kernel[(1,)](a, b, c, M, N, K)
    close(c, a.double() @ b.double().t(), 1.5e-3 if dt == torch.float32 else 1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dt", "D", "nw", "stages"),
    [(torch.bfloat16, 64, 4, 2), (torch.float16, 32, 4, 3), (torch.bfloat16, 64, 8, 3), (torch.bfloat16, 128, 4, 2)],
)
def test_attention(dt, D, nw, stages, causal):
    H, S = 2, 150
    q, k, v = (torch.randn(H, S, D).to(dt) for _ in range(3))
    o, L = torch.zeros_like(q), torch.zeros(H, S)
    attention_kernel[(triton.cdiv(S, 64), H)](
        q, k, v, o, L, S, D**-0.5, D=D, BM=64, BN=32, CAUSAL=causal, num_warps=nw, num_stages=stages
    )
    s = q.double() @ k.double().transpose(1, 2) * D**-0.5
    if causal:
        s = s.masked_fill(~torch.ones(S, S).tril().bool(), -float("inf"))
    close(o, s.softmax(-1) @ v.double(), 1e-2)
    close(L, torch.logsumexp(s, -1) * 1.44269504, 1e-5)


@triton.jit
def attention_backward_kernel(Q, K, V, DO, L, DL, DK, DV, S, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rd = tl.arange(0, D)
    base = tl.program_id(1).to(tl.int64) * S
    k = tl.load(K + (base + rn[:, None]) * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
    v = tl.load(V + (base + rn[:, None]) * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    for m in range(0, S, BM):
        rm = m + tl.arange(0, BM)
        q = tl.load(Q + (base + rm[:, None]) * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
        do = tl.load(DO + (base + rm[:, None]) * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
        lse = tl.load(L + base + rm, mask=rm < S, other=float("inf"))
        dl = tl.load(DL + base + rm, mask=rm < S, other=0.0)
        pT = tl.math.exp2(tl.dot(k, tl.trans(q)) * (scale * 1.44269504) - lse[None, :])
        dv = tl.dot(pT.to(do.dtype), do, dv)
        dsT = pT * (tl.dot(v, tl.trans(do)) - dl[None, :])
        dk = tl.dot(dsT.to(q.dtype), q, dk)
    tl.store(DK + (base + rn[:, None]) * D + rd[None, :], dk * scale, mask=rn[:, None] < S)
    tl.store(DV + (base + rn[:, None]) * D + rd[None, :], dv, mask=rn[:, None] < S)


@pytest.mark.parametrize("nw", [4, 8])
def test_attention_backward(nw):
    H, S, D = 2, 150, 64
    q, k, v, do = (torch.randn(H, S, D).bfloat16() for _ in range(4))
    Q, K, V = (t.double().requires_grad_() for t in (q, k, v))
    s = Q @ K.transpose(1, 2) * D**-0.5
    o = s.softmax(-1) @ V
    o.backward(do.double())
    L = (torch.logsumexp(s.detach(), -1) * 1.44269504).float()
    DL = (o.detach() * do.double()).sum(-1).float()
    dk, dv = torch.zeros(H, S, D), torch.zeros(H, S, D)
    attention_backward_kernel[(triton.cdiv(S, 64), H)](
        q, k, v, do, L, DL, dk, dv, S, D**-0.5, D, 32, 64, num_warps=nw, num_stages=2
    )
    close(dk, K.grad, 1e-2)
    close(dv, V.grad, 1e-2)


def test_a_tile_takes_milliseconds():
    a, b = torch.randn(128, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    c = torch.zeros(128, 128)
    with ptxsim.set_options(check_init=False, check_race=False):
        run_matmul(a, b, c, 128, 128, 32, num_stages=3)
        with ptxsim.record() as st:
            run_matmul(a, b, c, 128, 128, 32, num_stages=3)
    close(c, a.double() @ b.double(), 1e-6)
    s = st["matmul_kernel"]
    assert s.seconds < 0.5
    print(f"\n128^3 bf16 tile: {s.seconds * 1e3:.1f} ms, {s.thread_instr / s.seconds / 1e6:.0f} M thread-instr/s")
