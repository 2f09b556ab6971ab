"""Kernels that several tests and the benchmark run."""

import triton
import triton.language as tl


def close(a, b, tol=1e-5):
    a, b = a.double(), b.double()
    err = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
    assert err <= tol, f"max error {err} > {tol}"


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    p = tl.program_id(0) * B + tl.arange(0, B)
    m = p < n
    tl.store(o + p, tl.load(x + p, mask=m) + tl.load(y + p, mask=m, other=0.0), mask=m)


@triton.jit
def softmax_kernel(x, o, N, B: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, B)
    v = tl.load(x + r * N + c, mask=c < N, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + r * N + c, e / tl.sum(e, 0), mask=c < N)


@triton.jit
def layernorm_kernel(x, w, b, o, mean, rstd, N, eps, B: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, B)
    m = c < N
    v = tl.load(x + r * N + c, mask=m, other=0.0).to(tl.float32)
    mu = tl.sum(v, 0) / N
    d = tl.where(m, v - mu, 0.0)
    rs = 1 / tl.sqrt(tl.sum(d * d, 0) / N + eps)
    y = d * rs * tl.load(w + c, mask=m, other=0.0).to(tl.float32) + tl.load(b + c, mask=m, other=0.0).to(tl.float32)
    tl.store(o + r * N + c, y.to(o.dtype.element_ty), mask=m)
    tl.store(mean + r, mu)
    tl.store(rstd + r, rs)


@triton.jit
def transpose_kernel(x, o, M: tl.constexpr, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(o + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(v))


@triton.jit
def matmul_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    sam,
    sak,
    sbk,
    sbn,
    scm,
    scn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr,
):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    ap = a + rm[:, None] * sam + rk[None, :] * sak
    bp = b + rk[:, None] * sbk + rn[None, :] * sbn
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        x = tl.load(ap, mask=(rm[:, None] < M) & (rk[None, :] + k < K), other=0.0)
        y = tl.load(bp, mask=(rn[None, :] < N) & (rk[:, None] + k < K), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PREC, out_dtype=ACC)
        ap += BK * sak
        bp += BK * sbk
    tl.store(c + rm[:, None] * scm + rn[None, :] * scn, acc.to(c.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


def run_matmul(a, b, c, BM, BN, BK, prec="tf32", acc=tl.float32, **kw):
    (M, K), N = a.shape, b.shape[1]
    matmul_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN))](
        a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride(), BM=BM, BN=BN, BK=BK, PREC=prec, ACC=acc, **kw
    )


@triton.jit
def attention_kernel(Q, K, V, Out, Lse, S, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    pm = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    rm = pm * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    base = h * S * D
    q = tl.load(Q + base + rm[:, None] * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    qs = scale * 1.44269504
    hi = tl.minimum(S, (pm + 1) * BM) if CAUSAL else S
    for n in range(0, hi, BN):
        rn = n + tl.arange(0, BN)
        k = tl.load(K + base + rn[:, None] * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
        s = tl.dot(q, tl.trans(k)) * qs
        ok = rn[None, :] < S
        if CAUSAL:
            ok = ok & (rn[None, :] <= rm[:, None])
        s = tl.where(ok, s, -float("inf"))
        mn = tl.maximum(m, tl.max(s, 1))
        p = tl.math.exp2(s - mn[:, None])
        al = tl.math.exp2(m - mn)
        total = total * al + tl.sum(p, 1)
        acc = acc * al[:, None]
        v = tl.load(V + base + rn[:, None] * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = mn
    acc = acc / total[:, None]
    tl.store(Out + base + rm[:, None] * D + rd[None, :], acc.to(Out.dtype.element_ty), mask=rm[:, None] < S)
    tl.store(Lse + h * S + rm, m + tl.math.log2(total), mask=rm < S)
