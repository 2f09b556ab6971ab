import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import TARGETS, WHERE, Runner, raises_naming
from torch.utils.checkpoint import checkpoint

import ditfast
from ditfast import ops
from ditfast.ops.dispatch import choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_choices() -> None:
    assert choose_backend(CPU, "mlp")[0] == "torch"
    assert choose_backend(CUDA, "mlp") == ("triton", "the default on CUDA")
    with ditfast.backend("torch"):
        assert choose_backend(CUDA, "mlp") == ("torch", "forced by ditfast.backend")
        with ditfast.backend("triton"):
            assert choose_backend(CPU, "mlp")[0] == "triton"
        assert choose_backend(CUDA, "mlp")[0] == "torch"
    assert choose_backend(CUDA, "linear")[0] == "torch"
    assert choose_backend(CPU, "mlp")[0] == "torch"


def test_without_triton_cuda_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ditfast.ops.dispatch"], "has_triton", lambda: False)
    assert choose_backend(CUDA, "mlp") == ("torch", "triton is not installed")


def test_is_left_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), ditfast.backend("triton"):
        raise RuntimeError("inside")
    assert choose_backend(CPU, "mlp")[0] == "torch"


def test_threads_do_not_see_each_other() -> None:
    seen = []
    with ditfast.backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend(CPU, "mlp")[0]))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_unknown_name() -> None:
    def enter() -> None:
        with ditfast.backend("cuda"):
            pass

    assert "torch, triton" in raises_naming("backend", enter)


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
            found = torch.autograd.grad((y * weight).sum(), (x, v))
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


def test_kernels_take_64_bit_offsets(either: Runner) -> None:
    """A stride that fits 32 bits, times a batch index, does not; the storage is virtual memory that is hardly touched."""
    if either.device.type != "cpu":
        pytest.skip("takes 4 GiB of address space on the host")
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
