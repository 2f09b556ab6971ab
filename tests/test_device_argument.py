"""--device of every command and bench: an index for every GPU, and one line for a device that cannot be used."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

from ditfast.cli import main
from ditfast.devices import DeviceError, add_device_argument, default_device, find_device, find_gpu, with_index
from ditfast.dispatch import selection
from ditfast.dispatch.backends import Choice
from ditfast.dispatch.selection import check_possible, choose
from ditfast.dispatch.shapes import OpShape

TURING = {"name": "NVIDIA T4", "capability": (7, 5)}


def bench(name: str) -> Callable[[list[str]], int]:
    return lambda arguments: importlib.import_module(f"ditfast.benchmarks.{name}").main(arguments)


def command(name: str, *required: str) -> Callable[[list[str]], int]:
    return lambda arguments: main([name, *required, *arguments])


WITH_DEVICE = {
    "sample": command("sample", "--out", "run"),
    "train": command("train", "--data", "digits", "--steps", "1", "--out", "run"),
    "extract-latents": command("extract-latents", "images", "latents"),
    "bench.py": bench("bench"),
    "host.py": bench("host"),
    "sampling.py": bench("sampling"),
    "training.py": bench("training"),
}


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def parsed(*arguments: str) -> torch.device:
    parser = argparse.ArgumentParser()
    add_device_argument(parser)
    return parser.parse_args(arguments).device


# ------------------------------------------------------------------ an index
@pytest.mark.parametrize("arguments", [[], ["--device", "cuda"], ["--device", "cuda:0"]], ids=["default", "cuda", "cuda:0"])
def test_a_gpu_has_an_index_and_is_current(arguments: list[str]) -> None:
    with fake_cuda(count=2):
        torch.cuda.set_device(0)
        assert parsed(*arguments) == torch.device("cuda", 0)


def test_the_second_gpu_becomes_current() -> None:
    with fake_cuda(count=2):
        assert parsed("--device", "cuda:1") == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 1
        assert parsed("--device", "cuda") == torch.device("cuda", 1)


@pytest.mark.parametrize("arguments", [[], ["--device", "cuda"]], ids=["default", "cuda"])
def test_a_rank_takes_its_own_gpu(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with fake_cuda(count=2):
        assert parsed(*arguments) == torch.device("cuda", 1)


@pytest.mark.parametrize("rank", ["one", "", "-1"])
def test_a_local_rank_that_is_no_number_is_one_line(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    with fake_cuda(), pytest.raises(SystemExit, match="2"):
        parsed()
    message = capsys.readouterr().err
    assert f"LOCAL_RANK: got {rank!r}, expected a number" in message
    assert message.count("\n") == 1


def test_devices_of_python_users_get_an_index() -> None:
    with fake_cuda(count=2):
        torch.cuda.set_device(1)
        assert with_index("cuda") == torch.device("cuda", 1)
        assert with_index(torch.device("cuda", 0)) == torch.device("cuda", 0)
        assert with_index("cpu") == torch.device("cpu")


def test_the_cpu_is_the_default_without_a_gpu() -> None:
    with fake_cuda(count=0):
        assert parsed() == torch.device("cpu")


# ------------------------------------------------------------------ one line
@pytest.mark.parametrize("run", WITH_DEVICE.values(), ids=WITH_DEVICE)
@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("tpu", {}, "got 'tpu', expected cpu, cuda or cuda:N"),
        ("meta", {}, "got 'meta', expected cpu, cuda or cuda:N"),
        ("cuda:7", {}, "got 'cuda:7', but there is 1 GPU: take cuda:0, or use --device cpu"),
        ("cuda:2", {"count": 2}, "got 'cuda:2', but there are 2 GPUs: take cuda:0 to cuda:1, or use --device cpu"),
        ("cuda", {"count": 0}, "finds no GPU (Found no NVIDIA driver on your system): see that nvidia-smi"),
        ("cuda", TURING, "NVIDIA T4 has compute capability 7.5, and Triton needs 8.0 or later: take a newer GPU, or use"),
    ],
    ids=["unknown-kind", "meta", "cuda:7-of-1", "cuda:2-of-2", "no-gpu", "too-old"],
)
def test_one_line_for_a_device_that_cannot_be_used(
    run: Callable[[list[str]], int],
    device: str,
    gpus: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with fake_cuda(**gpus), pytest.raises(SystemExit) as exit_:
        run(["--device", device])
    assert exit_.value.code == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.count("\n") == 1
    assert f"error: argument --device: got '{device}'" in said
    assert message in said
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="no CPU build of torch")
def test_a_cpu_build_says_how_to_install_another() -> None:
    install = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    message = rf"got 'cuda:0', but torch {torch.__version__} is a CPU build: install one for CUDA with {install}, or use"
    with pytest.raises(DeviceError) as error:
        find_device("cuda:0")
    assert str(error.value).startswith(message)


def test_more_ranks_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with fake_cuda(count=2), pytest.raises(SystemExit) as exit_:
        parsed()
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "local rank 3 has none (there are 2 GPUs): start torchrun with --nproc-per-node 2" in said
    assert said.count("\n") == 1


def test_an_old_gpu_is_no_default(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_cuda(**TURING):
        assert default_device() == torch.device("cpu")
    message = "ditfast: warning: NVIDIA T4 has compute capability 7.5, and Triton needs 8.0 or later; the CPU is used\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("name", ["doctor", "tune"])
def test_commands_without_the_option_say_it_too(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with fake_cuda(count=2):
        assert main([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ditfast {name}: ")
    assert "local rank 3 has none (there are 2 GPUs)" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("gpus", "message"),
    [({"count": 0}, "finds no GPU"), (TURING, "NVIDIA T4 has compute capability 7.5, and Triton needs 8.0")],
    ids=["no-gpu", "too-old"],
)
def test_tune_needs_a_gpu(gpus: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_cuda(**gpus):
        assert main(["tune"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ditfast tune: needs a GPU, but ")
    assert message in said
    assert said.count("\n") == 1


def test_ops_of_an_old_gpu_stay_with_torch() -> None:
    reason = "NVIDIA T4 has compute capability 7.5, and Triton needs 8.0 or later"
    device = torch.device("cuda", 0)
    selection.forget()
    try:
        with fake_cuda(**TURING):
            assert choose(device, OpShape("gated_residual", torch.float16, 512, (256, 384))) == Choice("torch", reason)
            assert choose(device, OpShape("attention", torch.float16, 512, (256, 6, 64))).backend == "sdpa"
            with pytest.raises(RuntimeError, match=reason):
                check_possible("triton", device, OpShape("attention", torch.float16, 512, (256, 6, 64)))
    finally:
        selection.forget()


def test_amd_has_other_capabilities() -> None:
    with fake_cuda(name="AMD Instinct MI300X", capability=(6, 0), hip="7.0"):
        assert find_gpu() == torch.device("cuda", 0)
