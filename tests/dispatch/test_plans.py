"""Launch plans: later calls of an op launch what the first one did, on the tensors that they are given."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import OPS, cases, outputs_of
from support import TARGETS, WHERE, Runner
from torch import Tensor

import ditfast
from ditfast import ops
from ditfast.dispatch import launchers, plan

pytestmark = pytest.mark.skipif(WHERE == "interpreter", reason="the interpreter launches nothing that a plan could hold")


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with Runner.open(TARGETS[-1], checks=False):
        yield


@pytest.fixture
def jit_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched through Triton's ``JITFunction.run``."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    run = JITFunction.run

    def count(self: Any, *args: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", count)
    return names


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of the calls that enqueue a compiled kernel; tensors as their dtype, shape and distance from their storage."""
    from ptxsim.driver import SimLauncher

    calls: list[tuple[Any, ...]] = []
    enqueue = SimLauncher.__call__

    def note(self: Any, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *args: Any) -> None:
        calls.append((x, y, z, stream, function, metadata, *(described(arg) for arg in args[3:])))  # behind the hooks
        enqueue(self, x, y, z, stream, function, metadata, *args)

    monkeypatch.setattr(SimLauncher, "__call__", note)
    return calls


def described(arg: Any) -> Any:
    if not hasattr(arg, "data_ptr"):
        return type(arg), arg
    base = arg if isinstance(arg, Tensor) else arg.base
    return base.dtype, base.device, arg.data_ptr() - base.untyped_storage().data_ptr()


def operands_of(op: str, requires_grad: bool = False) -> list[Tensor]:
    case = cases()[op]
    differentiable = requires_grad and case.differentiable
    return [torch.randn(shape).to(case.dtype).requires_grad_(differentiable) for shape in case.shapes.values()]


def run(op: str, operands: list[Tensor]) -> list[Tensor]:
    """Return the op's outputs and, where operands need them, their gradients."""
    outputs = outputs_of(cases()[op].op, *operands)
    if not operands[0].requires_grad:
        return outputs
    return [*outputs, *torch.autograd.grad(outputs, operands, [torch.ones_like(output) for output in outputs])]


# ------------------------------------------------------------------------------------------------ the same launches
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("op", OPS)
def test_later_calls_launch_what_the_first_did(
    op: str, training: bool, jit_calls: list[str], launched: list[tuple[Any, ...]]
) -> None:
    if op == "grouped_linear" and training:
        pytest.skip("has no gradient on kernels")
    operands = operands_of(op, requires_grad=training)
    first = run(op, operands)
    assert jit_calls, "nothing was launched"
    by_triton = launched.copy()
    jit_calls.clear()
    launched.clear()
    later = run(op, operands)
    assert not jit_calls
    assert launched == by_triton
    assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_plan_takes_other_tensors_of_its_signature(op: str) -> None:
    run(op, operands_of(op, requires_grad=True))
    others = operands_of(op, requires_grad=True)
    planned = run(op, others)
    plan.forget_plans()
    assert all(torch.equal(a, b) for a, b in zip(planned, run(op, others), strict=True))


def test_one_tensor_twice_is_not_the_next_calls_business() -> None:
    x, h, vectors = torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.randn(3, 1, 32)
    ops.gated_residual(x, x, vectors[0])
    assert torch.equal(ops.gated_residual(x, h, vectors[1]), torch.addcmul(x, vectors[1], h))
    ops.layer_norm_modulate(x, vectors[0], vectors[1])  # views of one storage
    apart = [vectors[i].clone() for i in (2, 1)]
    later = ops.layer_norm_modulate(x, *apart)
    plan.forget_plans()
    assert torch.equal(later, ops.layer_norm_modulate(x, *apart))


# ------------------------------------------------------------------------------------------------ when another is made
def signatures(tensor: Tensor) -> list[Any]:
    return [
        plan.signature((other,))[0]
        for other in (
            tensor,
            tensor.double(),
            tensor[:1],
            tensor.transpose(0, 1),
            tensor.flatten()[1:],
            tensor.clone().requires_grad_(),
        )
    ]


def test_signatures_differ_by_all_that_a_launch_depends_on() -> None:
    tensor = torch.randn(4, 4)
    different = signatures(tensor)
    assert len(set(different)) == len(different)
    assert plan.signature((tensor.clone(),))[0] == different[0]
    with torch.no_grad():
        assert plan.signature((tensor,))[0] != different[0]
    assert plan.signature((tensor, True))[0] != plan.signature((tensor, 1))[0]
    assert plan.signature((tensor, [True]))[0] != plan.signature((tensor, [1]))[0]
    in_lists = [plan.signature((tensor, [other, tensor]))[0] for other in (tensor, tensor[:1], tensor.double())]
    assert len(set(in_lists)) == 3
    assert plan.signature((tensor, [tensor.clone().requires_grad_()]))[1]
    assert plan.signature(([],))[0] is not None


@pytest.mark.parametrize(
    "other",
    [torch.randn(2, 2).to_sparse(), [torch.randn(2, 2).to_sparse()], object()],
    ids=["sparse", "list-of-sparse", "object"],
)
def test_nothing_unusual_has_a_signature(other: Any) -> None:
    assert plan.signature((torch.zeros(1), other)) == (None, False)


@pytest.mark.parametrize("is_first", [True, False], ids=["first-call", "later-call"])
def test_lazily_negated_tensors_are_read_with_their_sign(is_first: bool) -> None:
    x, vectors = torch.randn(1, 4, 32), torch.randn(2, 1, 32)
    if not is_first:
        ops.layer_norm_modulate(x, *vectors)
    for negated in (torch._neg_view(x), torch._neg_view(torch.randn(1, 4, 64))[..., :32]):
        assert torch.equal(ops.layer_norm_modulate(negated, *vectors), ops.layer_norm_modulate(negated.resolve_neg(), *vectors))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-gradient", "gradient"])
@pytest.mark.parametrize("B", [1, 0])
def test_tensors_without_data_have_a_shape_only(B: int, requires_grad: bool) -> None:
    x, vector = torch.empty(B, 4, 32, device="meta", requires_grad=requires_grad), torch.empty(B, 32, device="meta")
    y = ops.layer_norm_modulate(x, vector, vector)
    assert (y.device.type, y.shape) == ("meta", x.shape)
    if requires_grad:
        y.backward(torch.empty_like(y))
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.usefixtures("on_triton")
def test_errors_are_those_of_a_first_call() -> None:
    x, vector = torch.randn(1, 4, 32), torch.randn(1, 32)
    ops.layer_norm_modulate(x, vector, vector)
    for wrong, message in (((x, vector[:, :16], vector), "shift: got shape"), ((x, vector, vector, True), "eps: got True")):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                ops.layer_norm_modulate(*wrong)


def test_a_plan_follows_the_backend(jit_calls: list[str]) -> None:
    x, vector = torch.randn(1, 4, 32), torch.randn(1, 32)
    fused = ops.layer_norm_modulate(x, vector, vector)
    with ditfast.backend("torch"):
        assert torch.allclose(ops.layer_norm_modulate(x, vector, vector), fused, atol=1e-5)
    assert jit_calls == ["layer_norm_modulate_kernel"]
    ops.layer_norm_modulate(x, vector, vector)
    assert len(jit_calls) == 1


def test_other_kernel_configs_are_launched_at_once(jit_calls: list[str]) -> None:
    from ditfast.kernels import tiles

    x, vector = torch.randn(1, 256, 128), torch.randn(1, 128)
    ops.layer_norm_modulate(x, vector, vector)
    with tiles.asking() as asked:
        ops.layer_norm_modulate(x, vector, vector)
    ((key, choices),) = asked.items()
    with tiles.trying({key: choices[1]}):
        ops.layer_norm_modulate(x, vector, vector)
    assert len(jit_calls) == 3


def test_a_profilers_hook_sees_launches(jit_calls: list[str]) -> None:
    import triton

    x, vector = torch.randn(1, 4, 32), torch.randn(1, 32)
    ops.layer_norm_modulate(x, vector, vector)
    seen = []
    hook = seen.append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        ops.layer_norm_modulate(x, vector, vector)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(jit_calls) == 2


def test_torch_profiler_shows_ops_by_name() -> None:
    x, vector = torch.randn(1, 4, 32), torch.randn(1, 32)
    ops.layer_norm_modulate(x, vector, vector)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.layer_norm_modulate(x, vector, vector)
    assert "ditfast::layer_norm_modulate" in {event.key for event in profile.key_averages()}


# ------------------------------------------------------------------------------------------------ what plans keep
def test_plans_keep_no_tensor() -> None:
    x, vector = torch.randn(1, 4, 32), torch.randn(1, 32)
    y = ops.layer_norm_modulate(x, vector, vector)
    kept = [weakref.ref(tensor) for tensor in (x, vector, y)]
    del x, vector, y
    gc.collect()
    assert not any(reference() is not None for reference in kept)


def test_the_oldest_signatures_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_SIGNATURES", 2)
    lists = plan.remember()
    first = lists("a")
    lists("b")
    assert lists("a") is first
    lists("c")  # b is the oldest
    assert lists("a") is first
    assert len(lists("b")) == 0


def test_threads_share_plans() -> None:
    operands = [operands_of("gated_residual_layer_norm_modulate") for _ in range(4)]
    expected = [run("gated_residual_layer_norm_modulate", given) for given in operands]
    plan.forget_plans()
    wrong: list[int] = []

    def work(i: int) -> None:
        with ditfast.backend("triton"):
            for _ in range(20):
                found = run("gated_residual_layer_norm_modulate", operands[i])
                if not all(torch.equal(a, b) for a, b in zip(found, expected[i], strict=True)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------------------------ the table of launchers
def test_every_launcher_is_a_registered_op() -> None:
    registered = {
        name.removeprefix("ditfast::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("ditfast::")
    }
    assert registered - set(launchers.launchers()) == {"linear_in_fp32", "attention_in_fp32"}
    assert set(launchers.launchers()) <= registered
