"""The computed memory against what the code keeps, counted by storages in a forward on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ditfast
from ditfast import DiTConfig, flops
from ditfast.config import CONDITIONINGS
from ditfast.dispatch import selection
from ditfast.flops.memory import _copies, sampling_bytes
from ditfast.ops import cpu_products
from ditfast.training.averages import Averages

BATCH = 3
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
PLANS = pytest.mark.parametrize("plan", ["keep", "checkpoint"])
DESIGNS = pytest.mark.parametrize("conditioning", CONDITIONINGS)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeT")]


class Storages(TorchDispatchMode):
    """Those made inside the ``with`` block that are alive, and the most they ever were; parameters and inputs left out."""

    def __init__(self, *others: Tensor):
        super().__init__()
        self._others = {storage(tensor) for tensor in others}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage(tensor) not in self._others:
                made = tensor.untyped_storage()
                self._made[made._cdata] = (StorageWeakRef(made), made.nbytes())
        self.most = max(self.most, self.alive())
        return out

    def alive(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(nbytes for _, nbytes in self._made.values())


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def small(conditioning: str = "adaln_zero", **fields: Any) -> DiTConfig:
    return DiTConfig(depth=2, hidden_size=96, num_heads=4, conditioning=conditioning, **{"input_size": (8, 12), **fields})


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops choose as for CUDA tensors, whatever this CPU multiplies."""
    choose = selection.choose
    monkeypatch.setattr(selection, "choose", lambda device, shape: choose(torch.device("cuda"), shape))
    monkeypatch.setattr(cpu_products, "SLOW_DTYPES", frozenset())


@contextlib.contextmanager
def forward_of(model: ditfast.DiT, dtype: torch.dtype) -> Iterator[tuple[Storages, Callable[[], Tensor]]]:
    """A forward to be called, and its storages: under autocast where the model has another dtype."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        own = model.pos_embed.dtype
        x, t = torch.empty(BATCH, *model.config.input_shape, dtype=own), torch.empty(BATCH)
        y = torch.zeros(BATCH, dtype=torch.long)
        weights = [mode.from_tensor(parameter) for parameter in model.parameters()]
        storages = Storages(x, t, y, *weights, *model.parameters())

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != own):
                return model(x, t, y)

        with storages:
            yield storages, forward


def trained(config: DiTConfig, plan: str) -> ditfast.DiT:
    model = ditfast.DiT(config).train()
    model.y_embedder.eval()  # as the trainer has it
    model.checkpoint_activations = plan == "checkpoint"
    return model


@DTYPES
@DESIGNS
@PLANS
@pytest.mark.usefixtures("as_on_cuda")
def test_what_a_forward_leaves(conditioning: str, dtype: torch.dtype, plan: str) -> None:
    check_what_a_forward_leaves(small(conditioning), dtype, plan)


@PLANS
@pytest.mark.usefixtures("as_on_cuda")
def test_our_attention_leaves_as_much(plan: str) -> None:
    with ditfast.attention_engine("triton"):
        check_what_a_forward_leaves(small(), torch.bfloat16, plan)


def check_what_a_forward_leaves(config: DiTConfig, dtype: torch.dtype, plan: str) -> None:
    with forward_of(trained(config, plan), dtype) as (storages, forward):
        out = forward()
        left = storages.alive() - out.nbytes
    assert left == flops.activation_bytes(config, BATCH, dtype, plan) + _copies(config, dtype.itemsize, plan)


@DTYPES
@DESIGNS
@pytest.mark.usefixtures("as_on_cuda")
def test_all_of_it_is_saved_for_the_backward(conditioning: str, dtype: torch.dtype) -> None:
    config, saved = small(conditioning), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[storage(tensor)] = tensor
        return tensor

    with forward_of(trained(config, "keep"), dtype) as (storages, forward):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward()
        left = storages.alive() - out.nbytes
        nbytes = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in storages._others)
    assert nbytes == left


@DTYPES
@DESIGNS
@pytest.mark.usefixtures("as_on_cuda")
def test_the_most_of_a_forward_without_gradients(conditioning: str, dtype: torch.dtype) -> None:
    config = small(conditioning)
    with torch.no_grad(), forward_of(ditfast.DiT(config).to(dtype).eval(), dtype) as (storages, forward):
        forward()
    assert storages.most == flops.activation_bytes(config, BATCH, dtype, "none")


@PLANS
@pytest.mark.usefixtures("as_on_cuda")
def test_the_most_of_a_step(plan: str) -> None:
    """Beyond what the forward leaves: what a block's backward passes on, and a block that is computed again."""
    config = DiTConfig(depth=12, hidden_size=96, num_heads=4, input_size=32)
    with forward_of(trained(config, plan), torch.bfloat16) as (storages, forward):
        forward().float().square().mean().backward()
    sizes = flops.training_bytes(config, BATCH, torch.bfloat16, plan)
    assert 1 <= storages.most / (sizes.activations + sizes.copies) < 1.1


@DTYPES
@DESIGNS
@PLANS
def test_a_cpu_keeps_no_less(conditioning: str, dtype: torch.dtype, plan: str) -> None:
    config = small(conditioning)
    with forward_of(trained(config, plan), dtype) as (storages, forward):
        out = forward()
        left = storages.alive() - out.nbytes
    assert left >= flops.activation_bytes(config, BATCH, dtype, plan)


@DTYPES
@DESIGNS
@pytest.mark.usefixtures("as_on_cuda")
def test_a_forward_without_gradients_takes_no_less(conditioning: str, dtype: torch.dtype) -> None:
    config = small(conditioning)
    most = flops.activation_bytes(config, BATCH, dtype, "none")
    assert sampling_bytes(config, BATCH, dtype, "cpu") < sampling_bytes(config, BATCH, dtype, "cuda") <= most


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_least_peak_of_a_step(accumulates: bool) -> None:
    sizes = flops.training_bytes(small(), BATCH, torch.float32, "keep")
    passing = sizes.gradients + sizes.activations if accumulates else max(sizes.gradients, sizes.activations)
    assert sizes.total - sizes.least_peak(accumulates=accumulates) == sizes.gradients + sizes.activations - passing


def test_state_of_a_run() -> None:
    config = small(input_size=4)
    model = ditfast.DiT(config)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values())
    averages = Averages(parameters, (0.9, 0.99))
    x, t, y = torch.randn(2, *config.input_shape), torch.tensor([5, 9]), torch.tensor([1, 2])
    model(x, t, y).square().mean().backward()
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    sizes = flops.training_bytes(config, 2, torch.float32, "keep", averages=2)
    assert sizes.weights == sum(p.nbytes for p in model.parameters())
    assert sizes.gradients == sum(p.grad.nbytes for p in parameters.values() if p.grad is not None)
    assert sizes.moments == sum(moment.nbytes for moment in moments)
    assert sizes.averages == sum(value.nbytes for average in averages.by_decay.values() for value in average.values())
    assert (sizes.copies, sizes.whole) == (0, 0)
    assert sizes.total == sum(sizes)


def test_shards() -> None:
    config = DiTConfig.from_name("DiT-B/2")
    alone, sharded = (flops.training_bytes(config, 32, torch.bfloat16, "keep", shards=shards) for shards in (1, 8))
    assert sharded[:4] == tuple(value // 8 for value in alone[:4])
    assert sharded[4:6] == alone[4:6]
    assert alone.whole == 0
    block = 4 * 12 * config.hidden_size**2
    assert 6 * block < sharded.whole < 7 * block


def test_an_unknown_plan() -> None:
    with pytest.raises(ValueError, match="plan: got 'all', expected one of none, keep, checkpoint"):
        flops.activation_bytes(small(), 1, torch.float32, "all")
    with pytest.raises(ValueError, match="plan: got 'none', expected one of keep, checkpoint"):
        flops.training_bytes(small(), 1, torch.float32, "none")
