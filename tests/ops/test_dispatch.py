import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import ON_CPU, TARGETS, WHERE, Runner, raises_naming
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ditfast
from ditfast import ops
from ditfast.dispatch import backends, override, selection
from ditfast.dispatch.selection import choose
from ditfast.dispatch.shapes import SIZES, OpShape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(device: torch.device, op: str, training: bool = False) -> tuple[str, str]:
    return choose(device, OpShape(op, torch.bfloat16, 256, (64,) * len(SIZES[op]), training))


@pytest.mark.usefixtures("unknown_device")
def test_choices() -> None:
    assert chosen(CPU, "mlp")[0] == "torch"
    assert chosen(CUDA, "mlp") == ("triton", "the default on CUDA")
    with ditfast.backend("torch"):
        assert chosen(CUDA, "mlp") == ("torch", "forced by ditfast.backend")
        with ditfast.backend("triton"):
            assert chosen(CPU, "mlp")[0] == "triton"
        assert chosen(CUDA, "mlp")[0] == "torch"
    assert chosen(CUDA, "linear")[0] == "torch"
    assert chosen(CPU, "mlp")[0] == "torch"


@pytest.mark.usefixtures("unknown_device")
def test_without_triton_cuda_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    selection.forget()
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert chosen(CUDA, "mlp") == ("torch", "triton is not installed")
    selection.forget()


def test_is_left_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), ditfast.backend("triton"):
        raise RuntimeError("inside")
    assert chosen(CPU, "mlp")[0] == "torch"


def test_threads_do_not_see_each_other() -> None:
    seen = []
    with ditfast.backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(chosen(CPU, "mlp")[0]))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_unknown_name() -> None:
    def enter() -> None:
        with ditfast.backend("cuda"):
            pass

    assert "torch, triton" in raises_naming("backend", enter)


def test_entering_a_context_often_compiles_once() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(1, 4, 128)
    torch._dynamo.reset()
    op = torch.compile(ops.gated_residual, fullgraph=True, backend=count)
    for _ in range(20):
        op(x, x, None)
        with ditfast.backend("torch"), ditfast.attention_engine("sdpa"):
            op(x, x, None)
    assert len(graphs) == 2


def test_contexts_of_threads_that_end_out_of_order() -> None:
    """A compiled graph follows what is still in force, not what a thread that left first happened to find."""
    first, second = ditfast.backend("triton"), ditfast.backend("torch")
    left = threading.Event()

    def other() -> None:
        with second:
            left.wait()

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        while len(override._in_force) < 2:
            pass
    assert override._latest.backend == "torch"
    left.set()
    thread.join()
    assert override._latest.backend is None


def test_a_context_can_be_entered_again() -> None:
    context = ditfast.backend("triton")
    for _ in range(2):
        with context:
            assert chosen(CPU, "mlp")[0] == "triton"
        assert chosen(CPU, "mlp")[0] == "torch"


@pytest.mark.usefixtures("unknown_device")
def test_gradients_of_gemms_take_the_library_by_default() -> None:
    assert chosen(CUDA, "mlp", training=True)[0] == "torch"
    assert chosen(CUDA, "layer_norm_modulate", training=True)[0] == "triton"
    with ditfast.backend("triton"):
        assert chosen(CUDA, "mlp", training=True)[0] == "triton"


class Dispatched(TorchDispatchMode):
    """Which ATen operators run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def trained_calls(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    return {
        "layer_norm_modulate": lambda: ops.layer_norm_modulate(leaf(1, 4, 32), leaf(1, 32), leaf(1, 32)),
        "linear_gelu": lambda: ops.linear_gelu(leaf(1, 4, 32), leaf(64, 32), leaf(64)),
        "mlp": lambda: ops.mlp(leaf(1, 4, 32), leaf(64, 32), leaf(64), leaf(32, 64), leaf(32)),
        "attention": lambda: ops.attention(leaf(1, 4, 3, 2, 16)),
        "cross_attention": lambda: ops.cross_attention(leaf(1, 4, 2, 16), leaf(1, 2, 2, 2, 16)),
    }


@pytest.mark.parametrize("name", ["layer_norm_modulate", "linear_gelu", "mlp", "attention", "cross_attention"])
def test_what_only_the_backward_reads_gets_no_gradient_of_zeros(compiled: Runner, name: str) -> None:
    y = trained_calls(compiled.device)[name]()
    dy = torch.randn_like(y)
    with Dispatched() as seen:
        y.backward(dy)
    assert not [name for name in seen.names if "zeros" in name]


def test_nothing_is_kept_that_no_gradient_needs(compiled: Runner) -> None:
    def kept(call: Callable[[], Tensor]) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
            call()
        return sorted(shapes)

    x, weight, bias = (torch.randn(*shape, device=compiled.device) for shape in ((1, 4, 32), (16, 32), (16,)))
    trained, v = x.clone().requires_grad_(), torch.randn(1, 32, device=compiled.device)
    assert kept(lambda: ops.linear(trained, weight, bias)) == [(16, 32)]
    assert kept(lambda: ops.linear(x, weight.requires_grad_(), bias)) == [(1, 4, 32)]
    assert kept(lambda: ops.gated_residual(trained, x, None)) == []
    assert kept(lambda: ops.gated_residual(trained, x, v)) == [(1, 4, 32), (1, 32)]


def launches(call: Callable[[], object]) -> dict[str, int]:
    import ptxsim

    with ptxsim.record() as recorded:
        call()
    return {name: stats.launches for name, stats in recorded.items()}


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
def test_compiled_graphs_follow_what_is_forced() -> None:
    x, v = torch.randn(1, 4, 128), torch.randn(1, 128)
    graph = torch.compile(ops.gated_residual, fullgraph=True, backend="aot_eager")
    expected = graph(x, x, v)
    with Runner.open("sm_80"):
        assert launches(lambda: torch.testing.assert_close(graph(x, x, v), expected)) == {"gated_residual_kernel": 1}
        with ditfast.backend("torch"):
            assert not launches(lambda: graph(x, x, v))
    assert torch.equal(graph(x, x, v), expected)


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_backward_runs_on_the_backend_of_its_forward(compiled: bool) -> None:
    op = torch.compile(ops.linear, fullgraph=True, backend="aot_eager") if compiled else ops.linear
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((1, 4, 32), (16, 32), (16,))]
    with Runner.open("sm_80"):
        on_triton = op(*inputs)
        with ditfast.backend("torch"):
            on_torch = op(*inputs)
            backward = {
                "input_gradient_kernel": 1,
                "weight_gradient_kernel": 1,
                "column_sum_kernel": 1,
                "sum_partials_kernel": 1,
            }
            assert launches(lambda: torch.autograd.grad(on_triton.square().sum(), inputs)) == backward
        assert not launches(lambda: torch.autograd.grad(on_torch.square().sum(), inputs))


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
def test_a_backward_on_another_thread_runs_on_the_backend_of_its_forward() -> None:
    """As autograd's own thread for CUDA does, which sees no context manager."""
    x = torch.randn(1, 4, 128, requires_grad=True)
    with Runner.open("sm_80"):
        y = ops.layer_norm_modulate(x, None, None)
        thread = threading.Thread(target=lambda: y.backward(torch.randn_like(y)))
        assert launches(lambda: (thread.start(), thread.join())) == {"joint_backward_kernel": 1}
    assert x.grad is not None


@pytest.mark.parametrize("forced", ["triton", "torch"])
def test_activation_checkpointing_recomputes_on_the_backend_of_the_forward(forced: str) -> None:
    x, v = torch.randn(1, 4, 128, requires_grad=True), torch.randn(1, 128, requires_grad=True)
    weight = torch.randn(1, 4, 128)
    with Runner.open(TARGETS[0]) as runner:
        x, v, weight = (tensor.to(runner.device) for tensor in (x, v, weight))
        with ditfast.backend(forced):
            y = checkpoint(
                lambda: ops.layer_norm_modulate(ops.gated_residual(x, x, v), v, v),
                use_reentrant=False,
                context_fn=ditfast.checkpoint_contexts,
            )
            plain = ops.layer_norm_modulate(ops.gated_residual(x, x, v), v, v)
        with ditfast.backend("torch" if forced == "triton" else "triton"):
            found = torch.autograd.grad((y * weight).sum(), (x, v), retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad((y * weight).sum(), (x, v)), strict=True))
            expected = torch.autograd.grad((plain * weight).sum(), (x, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_second_derivative_says_where_to_get_it(compiled: Runner) -> None:
    x = torch.randn(1, 4, 128, device=compiled.device, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.layer_norm_modulate(x, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend\\('torch'\\)"):
        torch.autograd.grad(dx.square().sum(), x)


def test_forced_triton_without_a_device_says_what_to_do() -> None:
    lines = [
        "import torch, ditfast",
        "x = torch.zeros(1, 4, 8)",
        "with ditfast.backend('triton'): ditfast.ops.gated_residual(x, x, None)",
    ]
    if WHERE == "gpu":
        pytest.skip("a GPU is there, and takes CUDA tensors only")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environment, check=False
    )
    assert "TRITON_INTERPRET=1" in done.stderr


@ON_CPU
def test_kernels_take_64_bit_offsets(either: Runner) -> None:
    """A stride that fits 32 bits, times a batch index, does not; the storage is virtual memory that is hardly touched."""
    far = 2**30 + 64
    storage = torch.from_numpy(np.zeros(2 * far + 3 * 128, np.int16)).view(torch.bfloat16)
    x = storage.as_strided((3, 3, 128), (far, 128, 1))
    x.copy_(torch.randn(3, 3, 128))
    with without_global_race_check():  # which would shadow every byte of the 4 GiB
        found = ops.layer_norm_modulate(x, None, None)
    torch.testing.assert_close(found, ops.layer_norm_modulate(x.contiguous(), None, None))


def without_global_race_check() -> contextlib.AbstractContextManager[object]:
    if WHERE != "simulator":
        return contextlib.nullcontext()
    import ptxsim

    return ptxsim.set_options(check_global=False)
