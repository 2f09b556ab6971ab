"""Whole models, forward and backward, through compiled kernels against the float64 reference."""

import time

import pytest
import torch
from support import DTYPES, TARGETS, Runner, assert_as_good_as, error, randomize
from torch import Tensor

from ditfast import DiT, DiTConfig, reference
from ditfast.config import CONDITIONINGS

# Hopper's kernels run in every CI; whatever else there is, in the slow tier.
AT_FULL_SIZE = [pytest.param(t, marks=() if t == TARGETS[-1] else pytest.mark.slow) for t in TARGETS]


def pair(config: DiTConfig, dtype: torch.dtype, runner: Runner) -> tuple[reference.DiT, DiT]:
    oracle = randomize(reference.DiT(config)).to(dtype)
    fast = DiT(config).to(dtype)
    fast.load_state_dict(oracle.state_dict())
    return oracle.eval().to(runner.device), fast.eval().to(runner.device)


def inputs(config: DiTConfig, B: int, dtype: torch.dtype, runner: Runner) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(B, *config.input_shape).to(runner.device, dtype)
    return x, torch.rand(B).to(runner.device) * 999, torch.randint(config.label_rows, (B,)).to(runner.device)


def gradient(model: torch.nn.Module, x: Tensor, t: Tensor, y: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Of every trained parameter and of x, for a random gradient of the output."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    model(x, t, y).backward(upstream)
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()  # or a later cast of the model would cast them
    assert all(grad is not None for grad in found.values()), "parameters without a gradient"
    return {"x": x.grad, **found}


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def check_training_step(config: DiTConfig, B: int, dtype: torch.dtype, runner: Runner) -> None:
    oracle, fast = pair(config, dtype, runner)
    x, t, y = inputs(config, B, dtype, runner)
    upstream = torch.randn(B, config.out_channels, *config.input_shape[1:]).to(runner.device, dtype)
    start = time.perf_counter()
    found = gradient(fast, x, t, y, upstream)
    print(f"forward and backward on {runner.target}: {time.perf_counter() - start:.0f} s")
    eager = gradient(oracle, x, t, y, upstream)
    exact = gradient(oracle.double(), x.double(), t, y, upstream.double())
    assert set(found) == set(exact)
    assert_as_good_as(joined(found), joined(exact), joined(eager))
    for name in exact:  # and none hides behind the others
        assert error(found[name], exact[name]) <= 2 * error(eager[name], exact[name]) + 1e-6, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_full_gradient_of_two_blocks(conditioning: str, dtype: str, compiled: Runner) -> None:
    config = DiTConfig(depth=2, hidden_size=144, num_heads=2, input_size=(8, 12), num_classes=7, conditioning=conditioning)
    check_training_step(config, 3, DTYPES[dtype], compiled)


@pytest.mark.parametrize("target", AT_FULL_SIZE)
def test_dit_s2_training_step_at_256px(target: str) -> None:
    with Runner.open(target, checks=False) as runner:
        check_training_step(DiTConfig.from_name("DiT-S/2", image_size=256), 1, torch.bfloat16, runner)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@torch.inference_mode()
def test_dit_xl2_forward_at_256px(target: str) -> None:
    with Runner.open(target, checks=False) as runner:
        config = DiTConfig.from_name("DiT-XL/2", image_size=256)
        oracle, fast = pair(config, torch.bfloat16, runner)
        x, t, y = inputs(config, 1, torch.bfloat16, runner)
        start = time.perf_counter()
        found = fast(x, t, y)
        print(f"forward on {target}: {time.perf_counter() - start:.0f} s")
        del fast
        eager = oracle(x, t, y)
        assert_as_good_as(found, oracle.double()(x.double(), t, y), eager)
