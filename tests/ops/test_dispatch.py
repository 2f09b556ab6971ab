import contextlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from support import WHERE, Runner, raises_naming

import ditfast
from ditfast import ops
from ditfast.ops.dispatch import choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_choices() -> None:
    assert choose_backend(CPU)[0] == "torch"
    assert choose_backend(CUDA) == ("triton", "the default on CUDA")
    with ditfast.backend("torch"):
        assert choose_backend(CUDA) == ("torch", "forced by ditfast.backend")
        with ditfast.backend("triton"):
            assert choose_backend(CPU)[0] == "triton"
        assert choose_backend(CUDA)[0] == "torch"
    assert choose_backend(CPU)[0] == "torch"


def test_without_triton_cuda_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ditfast.ops.dispatch"], "has_triton", lambda: False)
    assert choose_backend(CUDA) == ("torch", "triton is not installed")


def test_is_left_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), ditfast.backend("triton"):
        raise RuntimeError("inside")
    assert choose_backend(CPU)[0] == "torch"


def test_threads_do_not_see_each_other() -> None:
    seen = []
    with ditfast.backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend(CPU)[0]))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_unknown_name() -> None:
    def enter() -> None:
        with ditfast.backend("cuda"):
            pass

    assert "torch, triton" in raises_naming("backend", enter)


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
def test_forced_triton_launches_kernels_also_from_a_compiled_graph() -> None:
    import ptxsim

    x, v = torch.randn(1, 4, 128), torch.randn(1, 128)
    graph = torch.compile(ops.gated_residual, fullgraph=True, backend="aot_eager")
    expected = graph(x, x, v)
    with Runner.open("sm_80"), ptxsim.record() as launches:
        ops.layer_norm_modulate(x, v, v)
        ops.gated_residual(x, x, v)
        ops.gated_residual_layer_norm_modulate(x, x, v, v, v)
        ops.linear_gelu(x, torch.randn(32, 128), torch.randn(32))
        torch.testing.assert_close(graph(x, x, v), expected)
    assert {name: stats.launches for name, stats in launches.items()} == {
        "layer_norm_modulate_kernel": 1,
        "gated_residual_kernel": 2,
        "gated_residual_layer_norm_modulate_kernel": 1,
        "linear_gelu_kernel": 1,
    }


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
