"""Promises of the fake CUDA: it raises what a GPU raises, computes what the CPU does, and leaves torch as it was."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from fake_cuda.fixtures import fake_gpu
from support import Runner

from ditfast import ops

__all__ = ["fake_gpu"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU, or a process that has the fake")
ON_GPU = pytest.mark.usefixtures("fake_gpu")
SIZE = 512  # memory is counted in blocks of so many bytes


# ------------------------------------------------------------------ devices
def test_it_is_the_gpu_that_was_asked_for() -> None:
    with fake_cuda(name="NVIDIA A100", capability=(8, 0), memory=2**30, count=2):
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 2
        assert torch.cuda.get_device_name(1) == "NVIDIA A100"
        assert torch.cuda.get_device_capability() == (8, 0)
        assert torch.cuda.mem_get_info() == (2**30, 2**30)
        assert torch.cuda.get_device_properties("cuda:0").multi_processor_count == 108
    with fake_cuda(name="AMD Instinct MI300X", hip="6.4"):
        assert torch.version.hip == "6.4"
        assert torch.version.cuda is None


def test_a_build_for_cuda_without_a_gpu() -> None:
    with fake_cuda(count=0):
        assert torch.backends.cuda.is_built()
        assert not torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="Found no NVIDIA driver"):
            torch.zeros(1, device="cuda")


def test_hidden_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with fake_cuda(count=2):
        assert torch.cuda.device_count() == 1
        assert torch.cuda.get_device_properties(0).uuid.endswith("1")


@ON_GPU
def test_set_device_wants_an_index() -> None:
    with pytest.raises(ValueError, match=r"Expected a torch\.device with a specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    torch.cuda.set_device(torch.device("cuda", 0))


@ON_GPU
def test_no_such_device() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:7")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(1)


def test_two_devices() -> None:
    with fake_cuda(count=2):
        x, y = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        assert y.to("cuda:0").device == x.device
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            x + y
        with torch.cuda.device(1):
            assert torch.empty(1, device="cuda").device.index == 1
        assert torch.cuda.current_device() == 0


@ON_GPU
def test_devices_do_not_mix() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device, but got mat2 is on cpu"):
        x[None] @ torch.ones(3, 2)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # numbers may be the CPU's
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]  # and so may indices


# ------------------------------------------------------------------ tensors
@ON_GPU
def test_results_are_on_the_device() -> None:
    x = torch.randn(4, 6, device="cuda", requires_grad=True)
    view = x.view(24)[2:5]
    y = (x @ x.T).exp() + view[0]
    y.sum().backward()
    assert x.grad is not None
    assert {t.device for t in (x, view, y, x.grad, x.new_zeros(2), *torch.split(x, 2))} == {torch.device("cuda", 0)}
    assert x.cpu().device.type == "cpu"


@ON_GPU
def test_views_share_memory() -> None:
    x = torch.zeros(2, 3, device="cuda")
    x.T[0].fill_(5)
    x.resize_(2, 4)
    assert x.flatten()[:6].tolist() == [5, 0, 0, 5, 0, 0]
    out = torch.empty(0, device="cuda")
    torch.add(x, 1, out=out)
    assert out.shape == x.shape


@ON_GPU
def test_triton_kernels_compute_forward_and_backward() -> None:
    x = torch.randn(2, 17, 64, requires_grad=True)
    on_gpu = x.detach().cuda().requires_grad_()
    y, expected = ops.layer_norm_modulate(on_gpu, None, None), ops.layer_norm_modulate(x, None, None)
    upstream = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(y, on_gpu, upstream.cuda())
    assert y.device.type == dx.device.type == "cuda"
    torch.testing.assert_close(y.cpu(), expected)
    torch.testing.assert_close(dx.cpu(), *torch.autograd.grad(expected, x, upstream))


@ON_GPU
def test_triton_takes_no_cpu_tensor() -> None:
    from ditfast.kernels import layer_norm_modulate

    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        layer_norm_modulate(torch.randn(1, 4, 64), None, None, 1e-6, False)


@ON_GPU
def test_generators_are_the_devices_own() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = torch.randn(4, device="cuda")
    assert torch.equal(torch.get_rng_state(), before)
    torch.cuda.manual_seed_all(3)
    assert torch.equal(torch.randn(4, device="cuda"), first)
    own = torch.Generator("cuda").manual_seed(3)
    assert torch.equal(torch.randn(4, device="cuda", generator=own), first)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(4, device="cuda", generator=torch.Generator())


@ON_GPU
def test_what_training_needs() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 4)).cuda()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = model(torch.randn(2, 3, 8, 8).pin_memory().to("cuda", non_blocking=True))
    assert out.dtype == torch.bfloat16
    scaler.scale(out.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["2.bias"].device.type == "cuda"
    file.seek(0)
    assert torch.load(file, map_location="cpu")["2.bias"].device.type == "cpu"
    assert copy.deepcopy(model)[2].bias.device.type == "cuda"
    q = torch.randn(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16)
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape


@ON_GPU
def test_torch_compile_runs_without_inductor() -> None:
    x = torch.arange(3.0, device="cuda")
    assert torch.compile(lambda x: 2 * x + 1, fullgraph=True)(x).tolist() == [1, 3, 5]


# ------------------------------------------------------------------ streams and graphs
def captured(run: object) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()  # type: ignore[operator]
    return graph, result


@ON_GPU
def test_a_capture_computes_nothing_and_a_replay_follows_its_inputs() -> None:
    x, steps = torch.ones(2, 3, 64, device="cuda"), torch.zeros(1, device="cuda")

    def run() -> torch.Tensor:
        steps.add_(1)
        return ops.layer_norm_modulate(x * 2, None, None)

    x.copy_(torch.randn(2, 3, 64))
    run()
    graph, y = captured(run)
    assert y.isnan().all()
    assert steps.item() == 1
    for _ in range(2):
        x.copy_(torch.randn(2, 3, 64))
        graph.replay()
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(2 * x, (64,), eps=1e-6))
    assert steps.item() == 3


@ON_GPU
def test_a_captured_backward() -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    graph, (dx,) = captured(lambda: torch.autograd.grad(x.square().sum(), x))
    assert dx.isnan().all()
    graph.replay()
    assert dx.tolist() == [2, 2, 2]


@ON_GPU
@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda x: x[0].item(), id="item"),
        pytest.param(lambda x: x.cpu(), id="cpu"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: torch.tensor([1.0, 2.0], device="cuda"), id="tensor"),
        pytest.param(lambda x: torch.cuda.synchronize(), id="synchronize"),
    ],
)
def test_nothing_may_wait_in_a_capture(wait: object) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(
        RuntimeError, match=r"operation (not permitted when stream is capturing|failed due to a previous error)"
    ):
        captured(lambda: wait(x))  # type: ignore[operator]
    assert x.tolist() == [1, 1, 1]


@ON_GPU
def test_captures_want_a_stream_of_their_own() -> None:
    with pytest.raises(RuntimeError, match="must be captured on a non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()


@ON_GPU
def test_waiting_raises_if_wanted() -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    x.add_(1)
    x.to("cpu", non_blocking=True)
    for wait in (x.cpu, x.tolist, lambda: bool(x[0]), lambda: x[x > 0], lambda: torch.ones(2).cuda()):
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            wait()
    torch.cuda.set_sync_debug_mode("default")
    x.cpu()


@ON_GPU
def test_streams_and_events() -> None:
    stream, start, end = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        end.record()
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != stream
    end.synchronize()
    assert start.elapsed_time(end) > 0


# ------------------------------------------------------------------ memory
@ON_GPU
def test_memory_is_counted() -> None:
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 8 * SIZE  # of 4000 bytes
    torch.cuda.reset_peak_memory_stats()
    y = x * 2
    del y
    assert torch.cuda.max_memory_allocated() - before == 16 * SIZE
    view = x[:10]
    del x
    assert torch.cuda.memory_allocated() - before == 8 * SIZE
    del view
    assert torch.cuda.memory_allocated() == before


def test_memory_runs_out() -> None:
    with fake_cuda(memory=2**20):
        kept = torch.empty(2**19, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 0.75 MiB. GPU 0 has"):
            torch.empty(3 * 2**18, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**45, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            kept.double()
        del kept
        torch.empty(3 * 2**18, dtype=torch.uint8, device="cuda")


# ------------------------------------------------------------------ faults
def test_exp_off_by_one_ulp(fake_gpu: FakeCuda) -> None:
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(x.cuda().exp().cpu(), x.exp())
    fake_gpu.exp_off_by_one_ulp()
    assert torch.equal(x.cuda().exp().cpu(), torch.nextafter(x.exp(), torch.tensor(torch.inf)))
    assert torch.equal(x.cuda().double().exp().cpu(), x.double().exp())


def test_an_illegal_access_ends_all_use_of_the_gpu(fake_gpu: FakeCuda) -> None:
    x = torch.ones(2, 4, 64, device="cuda")
    fake_gpu.fail_next_launch()
    for use in (lambda: ops.layer_norm_modulate(x, None, None), lambda: x + 1, torch.cuda.synchronize, x.cpu):
        with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access was encountered"):
            use()


def test_nvml(fake_gpu: FakeCuda) -> None:
    import pynvml

    assert torch.cuda.clock_rate() == fake_gpu.nvml.clock_mhz
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    assert pynvml.nvmlDeviceGetPowerUsage(handle) == 1000 * fake_gpu.nvml.watts
    fake_gpu.nvml.break_function("nvmlDeviceGetTotalEnergyConsumption")
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def test_launches_are_counted(fake_gpu: FakeCuda) -> None:
    x = torch.ones(2, 4, 64, device="cuda")
    before = fake_gpu.launches
    x.view(8, 64)
    torch.empty(3, device="cuda")
    assert fake_gpu.launches == before
    x.add_(1)
    assert fake_gpu.launches == before + 1


@ON_GPU
def test_the_profiler_sees_every_launch(tmp_path: Path) -> None:
    x = torch.ones(2, 4, 64, device="cuda")
    ops.layer_norm_modulate(x, None, None)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        ops.layer_norm_modulate(x * 2, None, None)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    kinds = [event.get("cat") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert kinds.count("kernel") == 2
    assert "cpu_op" in kinds


# ------------------------------------------------------------------ installing
def test_torch_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = (torch._C, torch.cuda, torch.version, torch.UntypedStorage, torch._TorchCompileInductorWrapper)
    before = [dict(vars(owner)) for owner in owners]
    modules = {name: sys.modules.get(name) for name in ("pynvml", "torch.cuda.streams", "torch.cuda.graphs")}
    with fake_cuda():
        torch.zeros(1, device="cuda")
    for owner, attributes in zip(owners, before, strict=True):
        changed = {name for name in {*attributes, *vars(owner)} if attributes.get(name) is not vars(owner).get(name)}
        assert not changed, owner
    assert {name: sys.modules.get(name) for name in modules} == modules
    assert not torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "_initialized", False)  # which a failed call may leave True
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_a_failed_install_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCuda, "_simulate", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError), fake_cuda():
        pass
    assert not torch.cuda.is_available()


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(("target", "backend"), [("gpu", "triton"), ("gpu-torch", "torch")])
def test_cases_of_a_gpu_run_on_it(target: str, backend: str) -> None:
    with Runner.open(target) as runner:
        assert (runner.device, runner.backend) == (torch.device("cuda", 0), backend)
