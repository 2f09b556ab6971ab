import sys
import types

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MODEL_TOKENS
from support import (
    DTYPES,
    ON_CPU,
    ON_SIMULATOR,
    TARGETS,
    Runner,
    assert_as_good_as,
    assert_same_however_it_lies,
    gradients,
    in_any_order,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

import ditfast
from ditfast import ops
from ditfast.dispatch import backends, selection
from ditfast.dispatch.backends import Choice
from ditfast.dispatch.shapes import OpShape
from ditfast.ops.attention import choose_engine

CUDA = torch.device("cuda")
HEAD_DIMS = (32, 40, 64, 72, 80, 96, 128)
TOKENS = (1, 16, 17, 64, 100, 257)


def engine(device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int) -> Choice:
    """As if what is installed had not been looked up before."""
    selection.forget()
    try:
        return choose_engine(device, OpShape("attention", dtype, 8 * num_tokens, (num_tokens, 16, head_dim)))
    finally:
        selection.forget()


def packed(runner: Runner, B: int, T: int, H: int, d: int, dtype: torch.dtype) -> Tensor:
    """What the qkv linear gives out."""
    return torch.randn(B, T, 3 * H * d, device=runner.device).to(dtype).unflatten(-1, (3, H, d))


def check(runner: Runner, B: int, T: int, H: int, d: int, dtype: torch.dtype) -> None:
    """Output and gradients."""
    qkv = packed(runner, B, T, H, d, dtype)
    dout = torch.randn(B, T, H * d, device=runner.device).to(dtype)
    inputs = leaves(qkv)
    out = ops.attention(*inputs)
    assert out.is_contiguous()
    found = [out, *gradients([out], inputs, [dout])]

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(qkv, dtype=precision)
        out = oracles.attention(*copies, precision)
        return [out, *gradients([out], copies, [dout])]

    for value, exact, eager in zip(found, expected(torch.float64), expected(dtype), strict=True):
        assert_as_good_as(value, exact, eager)


# ------------------------------------------------------------------------------------------------ the kernels
@on_kernels(pairwise(d=HEAD_DIMS), d=(32, 64, 72, 128))
def test_kernel_head_dims(compiled: Runner, d: int) -> None:
    check(compiled, 2, 17, 3, d, torch.bfloat16)


@on_kernels(pairwise(T=TOKENS, dtype=("bf16", "fp16")), T=(1, 17, *MODEL_TOKENS), dtype=("bf16", "fp16"))
def test_kernel_tokens(compiled: Runner, T: int, dtype: str) -> None:
    check(compiled, 2, T, 3, 72, DTYPES[dtype])


@on_kernels(pairwise(d=(40, 64, 128), T=(16, 70)), d=(64, 72), T=(16, 70))
def test_kernel_full_precision(compiled: Runner, d: int, T: int) -> None:
    check(compiled, 1, T, 2, d, torch.float32)


@pytest.mark.slow
@ON_SIMULATOR
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("d", [*HEAD_DIMS, 8, 36, 200, 256])
def test_kernel_all(compiled: Runner, d: int, T: int, dtype: str) -> None:
    B, H = (1, 1) if T > 64 else (2, 3)
    check(compiled, B, T, H, d, DTYPES[dtype])


@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 70), H=st.integers(1, 3), d=st.sampled_from([1, 6, 8, 36, 72, 200]))
def test_any_shape(B: int, T: int, H: int, d: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, H, d, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 16, 3, 2, 72), (2, 0, 3, 2, 72)])
def test_gradients_of_nothing(either: Runner, shape: tuple[int, ...]) -> None:
    inputs = leaves(torch.empty(shape, device=either.device))
    out = ops.attention(*inputs)
    assert out.shape == (*shape[:2], 144)
    assert gradients([out], inputs, [torch.empty_like(out)])[0].shape == shape


def test_same_bits_in_any_order(compiled: Runner) -> None:
    inputs = leaves(packed(compiled, 2, 100, 2, 72, torch.bfloat16))
    dout = torch.randn(2, 100, 144, device=compiled.device)
    runs = []
    for _ in in_any_order():
        out = ops.attention(*inputs)
        runs.append([out, *gradients([out], inputs, [dout])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_large_scores_neither_overflow_nor_vanish(either: Runner) -> None:
    qkv = packed(either, 1, 100, 1, 64, torch.float32)
    qkv[:, :, 0] *= 1e6  # the softmax picks one key: exponents are in the millions
    best = (qkv[0, :, 0, 0] @ qkv[0, :, 1, 0].T).argmax(1)
    (dqkv,) = gradients([out := ops.attention(leaf := leaves(qkv)[0])], [leaf], [torch.ones(1, 100, 64, device=either.device)])
    torch.testing.assert_close(out[0], qkv[0, best, 2, 0], rtol=1e-3, atol=1e-3)
    assert dqkv.isfinite().all()


@pytest.mark.parametrize("masked", [40, 32], ids=["all keys", "the first tile's keys"])
def test_scores_of_minus_infinity_weigh_nothing(either: Runner, masked: int) -> None:
    """As torch's attention has it: zeros for a query without any other score, and no NaN among the gradients."""
    qkv = packed(either, 1, 40, 2, 16, torch.float32)
    qkv[:, :, 0, :, 0] = 0
    qkv[:, 3, 0, :, 0] = 1e30  # the only query that sees the keys' first dimension
    qkv[:, :masked, 1, :, 0] = -1e30
    dout = torch.randn(1, 40, 32, device=either.device)
    results = []
    for backend in (either.backend, "torch"):
        with ditfast.backend(backend):
            (leaf,) = leaves(qkv)
            out = ops.attention(leaf)
            results.append([out, *gradients([out], [leaf], [dout])])
    assert bool((results[0][0][:, 3] == 0).all()) == (masked == 40)
    (found, dfound), (expected, dexpected) = results
    torch.testing.assert_close(found, expected)
    assert dfound.isfinite().all()
    torch.testing.assert_close(dfound[..., 1:], dexpected[..., 1:])  # the first dimension's are roundings times 1e30


@pytest.mark.parametrize("shape", [(2, 5, 3, 1, 16), (2, 1, 3, 2, 16)], ids=["one head", "one token"])
def test_strides_of_dimensions_of_size_one_do_not_matter(either: Runner, shape: tuple[int, ...]) -> None:
    qkv = torch.randn(shape, device=either.device)
    strides = [7 if size == 1 else stride for size, stride in zip(shape, qkv.stride(), strict=True)]
    odd = torch.as_strided(qkv, shape, strides)
    assert odd.is_contiguous()
    assert torch.equal(ops.attention(odd), ops.attention(qkv))
    q, kv = odd[:, :, 0], odd[:, :, 1:]
    assert torch.equal(ops.cross_attention(q, kv), ops.cross_attention(qkv[:, :, 0], qkv[:, :, 1:]))


def test_reads_the_qkv_linears_output_as_it_lies(either: Runner) -> None:
    whole = torch.randn(20, 2, 3 * 4 * 32, device=either.device)
    qkv = whole[2:].transpose(0, 1).unflatten(-1, (3, 4, 32))
    dout = torch.randn(2, 18, 128, device=either.device)
    results = []
    for leaf in (*leaves(qkv), *leaves(qkv.contiguous())):
        out = ops.attention(leaf)
        results.append([out, *gradients([out], [leaf], [dout])])
    for found, expected in zip(*results, strict=True):
        assert_same_however_it_lies(either, found, expected)


def test_autocast(either: Runner) -> None:
    inputs = leaves(packed(either, 1, 17, 2, 32, torch.float32))
    with torch.autocast(either.device.type, torch.bfloat16):
        out = ops.attention(*inputs)
    assert out.dtype == torch.bfloat16
    assert gradients([out], inputs, [torch.randn(1, 17, 64, device=either.device)])[0].dtype == torch.float32


@pytest.mark.parametrize(("d", "T", "dtype"), pairwise(d=HEAD_DIMS, T=TOKENS, dtype=DTYPES))
def test_torch(d: int, T: int, dtype: str) -> None:
    with Runner.open("torch") as runner:
        qkv = packed(runner, 2, T, 3, d, DTYPES[dtype])
        out = ops.attention(qkv)
        assert out.is_contiguous()
        assert_as_good_as(out, oracles.attention(qkv, torch.float64), oracles.attention(qkv, qkv.dtype))


def test_gradients_of_torch() -> None:
    with Runner.open("torch") as runner:
        inputs = leaves(packed(runner, 2, 5, 2, 8, torch.float32))
        dout = torch.randn(2, 5, 16, device=runner.device)
        found = gradients([ops.attention(*inputs)], inputs, [dout])
        exact = gradients([oracles.attention(*inputs, torch.float64)], inputs, [dout])
        torch.testing.assert_close(found, exact)


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    (qkv,) = leaves(packed(compiled, 2, 6, 2, 16, torch.float32)[:, 1:])
    torch.library.opcheck(torch.ops.ditfast.attention.default, (qkv, True))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(packed(either, 2, 5, 2, 16, torch.float32))
    dout = torch.randn(2, 5, 32, device=either.device)
    graph = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    eager, traced = ops.attention(*inputs), graph(*inputs)
    assert torch.equal(traced, eager)
    for a, b in zip(gradients([traced], inputs, [dout]), gradients([eager], inputs, [dout]), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument() -> None:
    qkv = torch.zeros(2, 5, 3, 2, 8)
    assert "expected [B, T, 3, H, d]" in raises_naming("qkv", lambda: ops.attention(qkv[:, :, :2]))
    assert "float64" in raises_naming("qkv", lambda: ops.attention(qkv.double()))
    assert "contiguous" in raises_naming("qkv", lambda: ops.attention(qkv.transpose(3, 4)))


# ------------------------------------------------------------------------------------------------ the choice of an engine
@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, dict[str, object]]]:
    """A stand-in flash_attn module with the real one's signature and layouts, which cannot be installed without a GPU."""
    calls: list[tuple[Tensor, dict[str, object]]] = []

    def flash_attn_qkvpacked_func(
        qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, **options: object
    ) -> Tensor:
        calls.append((qkv, {"dropout_p": dropout_p, "softmax_scale": softmax_scale, **options}))
        B, T, _, H, d = qkv.shape
        return oracles.attention(qkv, qkv.dtype).view(B, T, H, d)

    module = types.ModuleType("flash_attn")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("flash_attn", loader=None)
    module.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(backends, "WHY_NO_FLASH", backends.why_no_flash())
    return calls


@pytest.mark.usefixtures("unknown_device")
def test_flash_attention_is_preferred_and_called_packed(
    flash_calls: list[tuple[Tensor, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine(CUDA, torch.bfloat16, 72, 256) == ("flash", "flash-attn is installed")
    monkeypatch.setattr(selection, "choose", lambda *_: Choice("flash", "as if on CUDA"))
    qkv = torch.randn(2, 17, 3, 4, 72).bfloat16()
    out = ops.attention(qkv)
    ((received, options),) = flash_calls
    assert received.shape == (2, 17, 3, 4, 72)
    assert received.data_ptr() == qkv.data_ptr()
    assert options == {"dropout_p": 0.0, "softmax_scale": None, "causal": False}
    assert out.shape == (2, 17, 288)
    assert_as_good_as(out, oracles.attention(qkv, torch.float64), oracles.attention(qkv, torch.bfloat16))


@pytest.mark.usefixtures("unknown_device")
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "does not run on cpu"),
        ("cuda", torch.float32, 64, "does not take float32"),
        ("cuda", torch.bfloat16, 512, "does not take head dim 512"),
        ("cuda", torch.bfloat16, 36, "does not take head dim 36"),
    ],
)
def test_falls_back_to_sdpa_with_a_reason(
    flash_calls: list[object], device: str, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    chosen, why = engine(torch.device(device), dtype, head_dim, 4096)
    assert chosen == "sdpa"
    assert reason in why


@pytest.mark.usefixtures("unknown_device")
@pytest.mark.parametrize(
    ("flash", "hip", "head_dim", "num_tokens", "expected"),
    [
        (True, None, 64, 4096, "flash"),
        (True, None, 72, 256, "flash"),
        (True, None, 72, 1024, "triton"),
        (False, None, 64, 4096, "sdpa"),
        (False, None, 72, 256, "sdpa"),
        (False, None, 72, 1024, "triton"),
        (True, "6.4", 64, 256, "triton"),
        (False, "6.4", 36, 256, "triton"),
        (True, "6.4", 512, 256, "sdpa"),
    ],
)
def test_triton_where_it_is_expected_to_win(
    monkeypatch: pytest.MonkeyPatch, flash: bool, hip: str | None, head_dim: int, num_tokens: int, expected: str
) -> None:
    monkeypatch.setattr(backends, "WHY_NO_FLASH", "" if flash else "flash-attn is not installed")
    monkeypatch.setattr(torch.version, "hip", hip)
    chosen, why = engine(CUDA, torch.bfloat16, head_dim, num_tokens)
    assert chosen == expected
    assert why
    with ditfast.backend("torch"):
        assert engine(CUDA, torch.bfloat16, head_dim, num_tokens)[0] in ("flash", "sdpa")


@pytest.mark.parametrize("name", ["flash", "sdpa", "triton"])
def test_forcing_an_engine(flash_calls: list[object], name: str) -> None:
    with ditfast.backend("torch"), ditfast.attention_engine(name):
        chosen = engine(CUDA, torch.bfloat16, 72, 256)
    assert chosen == (name, "forced by ditfast.attention_engine")


def test_an_engine_inside_a_backend(compiled: Runner) -> None:
    qkv = packed(compiled, 1, 17, 2, 32, torch.bfloat16)
    ours = ops.attention(qkv)
    with ditfast.attention_engine("sdpa"):
        theirs = ops.attention(qkv)
    with ditfast.backend("torch"):
        with ditfast.attention_engine("sdpa"):
            assert torch.equal(ops.attention(qkv), theirs)
        with ditfast.attention_engine("triton"):
            assert torch.equal(ops.attention(qkv), ours)


def test_an_engine_that_cannot_run_says_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.zeros(1, 4, 3, 1, 320)
    with ditfast.attention_engine("flash"), pytest.raises(RuntimeError, match=r"run on cpu: .*attention_engine\('sdpa'\)"):
        ops.attention(qkv)
    with ditfast.backend("triton"), pytest.raises(RuntimeError, match=r"up to 256, not 320: .*attention_engine\('sdpa'\)"):
        ops.attention(qkv)
    monkeypatch.setattr(backends, "WHY_NO_FLASH", "flash-attn is not installed")
    with ditfast.attention_engine("flash"), pytest.raises(RuntimeError, match="flash-attn is not installed"):
        engine(CUDA, torch.bfloat16, 64, 256)
    with pytest.raises(ValueError, match="attention: got 'fast', expected one of flash, sdpa, triton"):
        ditfast.attention_engine("fast").__enter__()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_choice_is_traceable(device: str) -> None:
    def chosen(x: Tensor) -> Tensor:
        return x + len(choose_engine(torch.device(device), OpShape("attention", x.dtype, len(x), (1024, 16, 72))).backend)

    x = torch.zeros(1, dtype=torch.float16)
    assert torch.equal(torch.compile(chosen, fullgraph=True, backend="aot_eager")(x), chosen(x))


def test_a_broken_flash_attn_is_named(monkeypatch: pytest.MonkeyPatch, flash_calls: list[object]) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c105ErrorC2")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    assert "undefined symbol" in backends.why_no_flash()
    monkeypatch.setattr(backends, "WHY_NO_FLASH", backends.why_no_flash())
    assert engine(CUDA, torch.bfloat16, 64, 256)[0] == "sdpa"


def test_a_flash_attn_without_the_function_is_named(monkeypatch: pytest.MonkeyPatch, flash_calls: list[object]) -> None:
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_qkvpacked_func")
    assert "no flash_attn_qkvpacked_func" in backends.why_no_flash()


def test_flash_is_not_asked_for_an_empty_batch(monkeypatch: pytest.MonkeyPatch, flash_calls: list[object]) -> None:
    monkeypatch.setattr(selection, "choose", lambda *_: Choice("flash", "as if on CUDA"))
    assert ops.attention(torch.empty(0, 16, 3, 4, 32)).shape == (0, 16, 128)
    assert not flash_calls
