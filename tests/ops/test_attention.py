import sys
import types

import oracles
import pytest
import torch
from oracles import TOKENS, WIDTHS
from support import DTYPES, Runner, assert_as_good_as, pairwise, raises_naming
from torch import Tensor

from ditfast import ops

attention_module = sys.modules["ditfast.ops.attention"]
CUDA = torch.device("cuda")


HEADS = {128: 4, 200: 5, 384: 6, 768: 12, 1024: 16, 1152: 16}


@pytest.mark.parametrize(("D", "T", "dtype"), pairwise(D=WIDTHS, T=TOKENS, dtype=DTYPES))
def test_parity(D: int, T: int, dtype: str) -> None:
    with Runner.open("torch") as runner:
        qkv = torch.randn(2, T, 3 * D, device=runner.device).to(DTYPES[dtype]).unflatten(-1, (3, HEADS[D], -1))
        out = ops.attention(qkv)
        assert out.is_contiguous()
        assert_as_good_as(out, oracles.attention(qkv, torch.float64), oracles.attention(qkv, DTYPES[dtype]))


def test_reads_the_qkv_linears_output_as_it_lies(either: Runner) -> None:
    whole = torch.randn(2, 20, 3 * 4 * 32, device=either.device)
    qkv = whole[:, 2:].unflatten(-1, (3, 4, 32))
    assert torch.equal(ops.attention(qkv), ops.attention(qkv.contiguous()))


def test_empty_batch(either: Runner) -> None:
    assert ops.attention(torch.empty(0, 16, 3, 4, 32, device=either.device)).shape == (0, 16, 128)


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
    monkeypatch.setattr(attention_module, "WHY_NO_FLASH", attention_module.why_no_flash())
    return calls


def test_flash_attention_is_preferred_and_called_packed(
    flash_calls: list[tuple[Tensor, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_module.choose_engine(CUDA, torch.bfloat16, 72) == ("flash", "flash-attn is installed")
    monkeypatch.setattr(attention_module, "choose_engine", lambda *_: ("flash", "as if on CUDA"))
    qkv = torch.randn(2, 17, 3, 4, 72).bfloat16()
    out = ops.attention(qkv)
    ((received, options),) = flash_calls
    assert received.shape == (2, 17, 3, 4, 72)
    assert received.data_ptr() == qkv.data_ptr()
    assert options == {"dropout_p": 0.0, "softmax_scale": None, "causal": False}
    assert out.shape == (2, 17, 288)
    assert_as_good_as(out, oracles.attention(qkv, torch.float64), oracles.attention(qkv, torch.bfloat16))


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
    engine, why = attention_module.choose_engine(torch.device(device), dtype, head_dim)
    assert engine == "sdpa"
    assert reason in why


def test_a_broken_flash_attn_is_named(monkeypatch: pytest.MonkeyPatch, flash_calls: list[object]) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c105ErrorC2")

    monkeypatch.setattr(attention_module.importlib, "import_module", fail)
    assert "undefined symbol" in attention_module.why_no_flash()
    monkeypatch.setattr(attention_module, "WHY_NO_FLASH", attention_module.why_no_flash())
    assert attention_module.choose_engine(CUDA, torch.bfloat16, 64)[0] == "sdpa"


def test_a_flash_attn_without_the_function_is_named(monkeypatch: pytest.MonkeyPatch, flash_calls: list[object]) -> None:
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_qkvpacked_func")
    assert "no flash_attn_qkvpacked_func" in attention_module.why_no_flash()


def test_flash_is_not_asked_for_an_empty_batch(monkeypatch: pytest.MonkeyPatch, flash_calls: list[object]) -> None:
    monkeypatch.setattr(attention_module, "choose_engine", lambda *_: ("flash", "as if on CUDA"))
    assert ops.attention(torch.empty(0, 16, 3, 4, 32)).shape == (0, 16, 128)
    assert not flash_calls


def test_gradients() -> None:
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    weight = torch.randn(2, 5, 16)
    (found,) = torch.autograd.grad((ops.attention(qkv) * weight).sum(), qkv)
    (exact,) = torch.autograd.grad((oracles.attention(qkv, torch.float64) * weight).sum(), qkv)
    torch.testing.assert_close(found, exact)


def test_errors_name_the_argument() -> None:
    qkv = torch.zeros(2, 5, 3, 2, 8)
    assert "expected [B, T, 3, H, d]" in raises_naming("qkv", lambda: ops.attention(qkv[:, :, :2]))
    assert "float64" in raises_naming("qkv", lambda: ops.attention(qkv.double()))
    assert "contiguous" in raises_naming("qkv", lambda: ops.attention(qkv.transpose(3, 4)))


def test_opcheck_and_fullgraph() -> None:
    qkv = torch.randn(2, 5, 3, 2, 8)
    torch.library.opcheck(torch.ops.ditfast.attention.default, (qkv,))
    assert torch.equal(torch.compile(ops.attention, fullgraph=True, backend="aot_eager")(qkv), ops.attention(qkv))
