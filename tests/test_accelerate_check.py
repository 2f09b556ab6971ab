"""The parity check itself: where it computes, how exactly, how much memory it takes, and what it leaves as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm_style
import torch
from fake_cuda import FakeCuda
from fake_cuda.fixtures import fake_gpu
from foreign import official, official_inputs, run
from support import DTYPES, error, randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ditfast
from ditfast.homes import comparison, copies

__all__ = ["fake_gpu"]

pytestmark = pytest.mark.usefixtures("one_thread")
HIGH = "high"  # TF32 on a GPU


class OnGpus(timm_style.Attention):
    """Attention with an operator that has no CPU implementation."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_cuda
        return super().forward(x)


def rows_are_swapped(model: nn.Module) -> list[bool]:
    return [row.swapped for row in ditfast.acceleration_report(model).rows]


def test_a_fork_that_only_runs_on_gpus_is_checked_there(fake_gpu: FakeCuda) -> None:
    model, inputs = official(depth=2), official_inputs()
    for block in model.blocks:
        block.attn.__class__ = OnGpus
    with pytest.raises(ValueError, match="AssertionError"):
        ditfast.accelerate(model)
    model.cuda()
    inputs = {name: value.cuda() for name, value in inputs.items()}
    state = torch.cuda.get_rng_state()
    with torch.no_grad():
        before = run(model, inputs)[0]
        found = run(ditfast.accelerate(model), inputs)[0]
    assert rows_are_swapped(model) == [True] * 3
    assert error(found.cpu(), before.cpu()) <= 1e-5
    assert torch.equal(torch.cuda.get_rng_state(), state)


def older(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def newer(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = {HIGH: "tf32"}[precision]


@pytest.fixture(params=[older, newer])
def set_precision(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    before = precisions()
    yield request.param
    older("highest")
    for setting, precision in zip(settings(), before, strict=True):
        setting.fp32_precision = precision


def settings() -> list[Any]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv]


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in settings()]


def test_products_are_not_rounded_in_the_check_and_as_before_after_it(set_precision: Callable[[str], None]) -> None:
    set_precision(HIGH)
    before = precisions()
    assert "tf32" in before
    assert "tf32" not in copies.run_isolated(precisions)
    assert precisions() == before


class Fp32Stream(timm_style.Block):
    """Block that keeps the stream in fp32, whatever its weights are in."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        dtype = self.attn.qkv.weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c.to(dtype)).float().chunk(6, dim=1)  # [B, D]
        x = x.float()  # [B, T, D]
        u = timm_style.modulate(self.norm1(x), shift1, scale1).to(dtype)  # [B, T, D]
        x = x + gate1[:, None] * self.attn(u).float()
        u = timm_style.modulate(self.norm2(x), shift2, scale2).to(dtype)  # [B, T, D]
        return x + gate2[:, None] * self.mlp(u).float()


class Fp32Output(timm_style.DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.to(self.pos_embed.dtype), t, y).float()  # [B, C', H, W]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", ["fp32", "bf16"])
@pytest.mark.parametrize("condition", ["fp32", "bf16"])
def test_blocks_with_an_fp32_stream_keep_its_dtype(dtype: str, stream: str, condition: str) -> None:
    block = randomize(Fp32Stream(64, 4)).to(DTYPES[dtype])
    x, c = torch.randn(2, 16, 64).to(DTYPES[stream]), torch.randn(2, 64).to(DTYPES[condition])
    with torch.no_grad():
        expected = block(x, c)
        found = ditfast.accelerate(block, strict=False)(x, c)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected) or (dtype == "fp32" and error(found, expected) <= 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latents", DTYPES)
def test_models_that_cast_what_they_take_and_return_still_do(dtype: str, latents: str) -> None:
    model = official(Fp32Output).to(DTYPES[dtype])
    inputs = official_inputs(DTYPES[latents])
    with torch.no_grad():
        expected = run(model, inputs)[0]
        found = run(ditfast.accelerate(model), inputs)[0]
    assert found.dtype == expected.dtype == torch.float32
    assert error(found, expected) <= (1e-5 if dtype == "fp32" else 3e-2)
    assert [row.module for row in ditfast.acceleration_report(model).rows if not row.fast_calls] == ["(model)"] * (
        dtype != "fp32" or latents != "fp32"
    )


class Memory(TorchDispatchMode):
    """Count of the bytes of the tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_the_check_takes_at_most_twice_the_memory_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = official(depth=6, D=256)
    memory = Memory()

    def counted(check: Callable[[], None]) -> None:
        def work() -> None:
            with memory:
                check()

        copies.run_isolated(work)

    monkeypatch.setattr(comparison, "run_isolated", counted)
    ditfast.accelerate(model)
    assert rows_are_swapped(model) == [True] * 7
    block = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
    assert block < memory.peak <= 2 * block
