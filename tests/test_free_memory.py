"""Work that does not fit into the memory or onto the disk: refused in one line, and ended by one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import measured_memory
import numpy as np
import pytest
import torch
from inception_stand_in import install
from measured_memory import BATCH, CONFIG, SAMPLES, TRAINED
from rich.console import Console
from tiny_vae import tiny

import ditfast
from ditfast import DiTConfig, flops, free_memory
from ditfast.benchmarks import bench
from ditfast.benchmarks import sampling as sampling_bench
from ditfast.benchmarks import training as training_bench
from ditfast.benchmarks.results import new_results
from ditfast.benchmarks.rivals import random_case
from ditfast.cli import main
from ditfast.dtypes import DTYPES
from ditfast.files import check_room, format_bytes
from ditfast.flops.memory import sampling_bytes
from ditfast.free_memory import MemoryShortage, enough_memory, free_bytes, is_out_of_memory
from ditfast.images import save_npz

CPU = torch.device("cpu")
GB = 10**9
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Return a function that makes files under ``proc`` and ``cgroups``, which stand for the system's."""
    folder = tmp_path / "system"
    monkeypatch.setattr(free_memory, "PROC", folder / "proc")
    monkeypatch.setattr(free_memory, "CGROUPS", folder / "cgroups")

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return write


def machine_with(kilobytes: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {kilobytes} kB\nSwapFree:  5 kB\n"}


# ------------------------------------------------------------------------------------------------ what is free
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "cgroups/a/memory.max": "9000\n",
    "cgroups/a/memory.current": "6000\n",
    "cgroups/a/memory.stat": "anon 5000\ninactive_file 700\nactive_file 200\n",
    "cgroups/a/b/memory.max": "max\n",
    "cgroups/a/b/memory.current": "6000\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/\n4:memory,hugetlb:/docker/x\n",  # in a container, whose own cgroup is the root
    "cgroups/memory/memory.limit_in_bytes": "9000\n",
    "cgroups/memory/memory.usage_in_bytes": "6000\n",
    "cgroups/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 700\ntotal_active_file 200\n",
}


@pytest.mark.parametrize("cgroups", [V2, V1], ids=["v2", "v1"])
def test_free_memory_is_the_least_that_the_system_grants(
    system: Callable[[dict[str, str]], None], cgroups: dict[str, str]
) -> None:
    assert free_bytes(CPU) is None  # a system without such files
    system(machine_with(100))
    assert free_bytes(CPU) == 105 * 1024
    system(cgroups)
    assert free_bytes(CPU) == 9000 - 6000 + 900 + 5 * 1024


def test_ranks_of_a_machine_share_its_memory(system: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    system(machine_with(100))
    assert free_bytes(CPU) == 21 * 1024


@pytest.mark.parametrize(
    ("limit", "field"), [(resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)], ids=["address-space", "data"]
)
def test_a_ulimit_counts(
    system: Callable[[dict[str, str]], None], limit: int, field: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = ["9"] * 7
    pages[field] = "3"
    system({**machine_with(10**6), "proc/self/statm": " ".join(pages)})
    limits = {limit: (10**6, 10**6)}
    monkeypatch.setattr(resource, "getrlimit", lambda name: limits.get(name, (resource.RLIM_INFINITY,) * 2))
    assert free_bytes(CPU) == 10**6 - 3 * resource.getpagesize()


def error_of(work: Callable[[], object]) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError


def test_errors_of_memory_that_ran_out_are_known() -> None:
    errors = [
        error_of(lambda: torch.empty(2**50)),
        error_of(lambda: torch.empty(2**62)),
        error_of(lambda: bytearray(2**62)),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ]
    assert [error for error in errors if not is_out_of_memory(error)] == []
    assert not any(
        map(is_out_of_memory, [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space"), ValueError("memory")])
    )


# ------------------------------------------------------------------------------------------------ estimates
def test_work_is_refused_warned_of_or_ended(system: Callable[[dict[str, str]], None], recwarn: pytest.WarningsRecorder) -> None:
    system(machine_with(10**6))
    with enough_memory("n: got 3", CPU, "take 2", least=GB):
        pass
    assert not recwarn.list
    line = r"n: got 3, for which the device has too little memory \(about 1\.2 GB, but 1\.02 GB are free\): take 2"
    with pytest.raises(MemoryShortage, match=line), enough_memory("n: got 3", CPU, "take 2", least=12 * GB // 10):
        raise AssertionError
    warned = pytest.warns(UserWarning, match=r"n: got 3, which may not fit into the memory \(about 2 GB, but")
    with warned, enough_memory("n: got 3", CPU, "take 2", least=1, estimate=2 * GB):
        pass
    with pytest.raises(MemoryShortage, match=r"about 7 B, and 1\.02 GB were free"), enough_memory("n: got 3", CPU, "", least=7):
        torch.empty(2**50)
    with pytest.raises(ValueError, match="else"), enough_memory("n: got 3", CPU, "", least=7):
        raise ValueError("something else")


@pytest.mark.full
def test_estimates_against_measured_peaks() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, measured_memory.__file__], capture_output=True, text=True, env=environment, check=True
    )
    peaks = json.loads(done.stdout)
    for name, recipe in TRAINED.items():
        plan = "checkpoint" if "checkpoint_activations" in recipe else "keep"
        sizes = flops.training_bytes(CONFIG, BATCH, DTYPES[recipe.get("dtype", "fp32")], plan)
        assert sizes.least_peak(accumulates=False) <= peaks[name] <= 2 * sizes.total, name
    for name in ("sample", "sample by torch"):
        least = sampling_bytes(CONFIG, 2 * SAMPLES, torch.float32, "cpu")
        assert least <= peaks[name] <= 6 * least, name


# ------------------------------------------------------------------------------------------------ commands
def photographs(folder: Path) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    for number in range(4):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.new("RGB", (48, 48), (number, 2, 99)).save(path)
    return folder / "photos"


def test_a_batch_that_cannot_fit_is_one_line(
    system: Callable[[dict[str, str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    system(machine_with(8_008_000))
    monkeypatch.chdir(tmp_path)
    data, out = str(photographs(tmp_path)), str(tmp_path / "run")
    train = ["train", "--device", "cpu", "--steps", "1", "--out", out, "--data"]
    refused = {
        ("--batch: got 256", "about 706 GB", "take --accumulate 256,", "latents"): [*train, data, "--model", "DiT-B/4"],
        ("--batch: got 4096", "--accumulate"): [*train, data, "--model", "DiT-S/8", "--batch", "4096"],
        ("--batch: got 1", "take a smaller --model, or latents"): [
            *(*train, data, "--model", "DiT-XL/2", "--batch", "1", "--image-size", "512")
        ],
        ("--batch: got 1048576", "--accumulate"): [*train, "digits", "--batch", "1048576"],
        ("--batch: got 1048576", "take a smaller one"): [
            *("sample", "--device", "cpu", "--out", out, "--num", "1048576", "--batch", "1048576")
        ],
    }
    for expected, arguments in refused.items():
        assert main(arguments) == 1, arguments
        said = capsys.readouterr().err
        assert said.startswith(f"ditfast {arguments[0]}: ")
        assert said.count("\n") == 1
        for part in (*expected, "but 8.2 GB are free"):
            assert part in said
    assert not Path(out).exists()


def test_a_batch_of_a_vae_or_of_inception_that_cannot_fit_is_one_line(
    system: Callable[[dict[str, str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    system(machine_with(20_000))
    monkeypatch.chdir(tmp_path)
    vae = tiny().eval()
    monkeypatch.setattr("ditfast.vae.load_vae", lambda source: vae)
    install(tmp_path / "weights.pth", monkeypatch)
    save_npz(tmp_path / "a.npz", iter(np.zeros((9, 8, 8, 3), np.uint8)), [0] * 9)
    refused = {
        "--batch: got 99": ["extract-latents", str(photographs(tmp_path)), "latents", "--batch", "99", "--device", "cpu"],
        "--batch-size: got 64": ["evaluate", "a.npz", "--reference", "a.npz", "--inception", "weights.pth"],
    }
    for message, arguments in refused.items():
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"ditfast {arguments[0]}: {message}, for which the device has too little memory (about ")
        assert "but 20.5 MB are free" in said
        assert said.count("\n") == 1


def test_memory_that_runs_out_in_the_middle_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditfast.sampling.Sampler.__call__", lambda *arguments, **options: torch.empty(2**50))
    monkeypatch.setattr("ditfast.commands.train.open_data", lambda *arguments, **options: bytearray(2**62))
    checks = {
        ("sample", "--out", str(tmp_path / "a.png"), "--steps", "ddim2", "--device", "cpu"): "--batch: got 100, for which",
        ("train", "--data", "digits", "--steps", "1", "--out", str(tmp_path / "run")): "the device has too little memory (",
    }
    for arguments, message in checks.items():
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"ditfast {arguments[0]}: {message}")
        assert said.count("\n") == 1


def test_benches_leave_out_what_cannot_fit(
    system: Callable[[dict[str, str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    system(machine_with(2_000_000))
    skipped = "but 2.05 GB are free: take a smaller"
    arguments = ["--device", "cpu", "--out", str(tmp_path / "out"), "--batch"]
    assert training_bench.main([*arguments, "99999", "--models", "DiT-S/2", "--rivals", "ditfast:bf16"]) == 1
    assert skipped in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="1"):
        sampling_bench.main([*arguments, "99999"])
    said = capsys.readouterr().err
    assert "the reference's run does not fit into memory (about" in said
    assert said.count("\n") == 1
    case = random_case("DiT-S/2", DiTConfig.from_name("DiT-S/2"), 99999, CPU, "fp32")
    run = bench._Run(Namespace(save=False, out=tmp_path), new_results("bench", CPU), None, Console())
    assert not run._fits(case)
    assert run._fits(dataclasses.replace(case, batch=1))
    assert skipped in run.results.notes[0]


def test_a_bench_without_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "open_gpu", lambda device: torch.empty(2**50))
    with pytest.raises(SystemExit, match="1"):
        bench.main(["--device", "cpu"])
    said = capsys.readouterr().err
    assert said.startswith("ditfast bench: the device has too little memory (")
    assert said.count("\n") == 1


# ------------------------------------------------------------------------------------------------ disks
def test_sizes_read_as_a_person_reads_them() -> None:
    sizes = [0, 999, 1000, 410_000, 999_499, 999_999, 21 * GB, 3 * 10**15]
    assert list(map(format_bytes, sizes)) == ["0 B", "999 B", "1 kB", "410 kB", "999 kB", "1 MB", "21 GB", "3 PB"]


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.usefixtures("small_disk")
def test_room_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    check_room(tmp_path / "a" / "b", 100_000, "files")
    with pytest.raises(OSError, match=r"the files take up to 410 kB, but 100 kB are free"):
        check_room(tmp_path / "a" / "b", 410_000, "files")
    with pytest.raises(OSError, match=r"the files take up to 100\.001 kB, but 100 kB are free"):
        check_room(tmp_path, 100_001, "files")


@pytest.mark.usefixtures("small_disk")
def test_a_small_disk_is_one_line_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "in" / "digits.safetensors"
    weights.parent.mkdir()
    shutil.copy(next(Path(ditfast.__file__).parent.glob("data/*.safetensors")), weights)
    folder = tmp_path / "out"
    commands = {
        "the checkpoints, with --keep of them": [
            *("train", "--data", "digits", "--steps", "1", "--batch", "2", "--out", str(folder))
        ],
        "the images take up to 4.16 MB": ["sample", "--num", "1000", "--out", str(folder)],
        "the weights take up to 3.74 MB": ["convert", str(weights), str(tmp_path / "out.safetensors"), "--to", "official"],
    }
    for expected, arguments in commands.items():
        assert main([*arguments, *(["--device", "cpu"] if arguments[0] != "convert" else [])]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert "but 100 kB are free" in said
        assert said.count("\n") == 1
    assert not list(folder.iterdir())
    assert not list(tmp_path.glob("out.*"))
