"""What gets installed, and that our kernels/ stays out of the way of Hugging Face's package of that name."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT_DIFFUSERS = "import diffusers; print(diffusers.DiTTransformer2DModel.__name__)"

SAMPLE_AND_EVALUATE = """
import socket
def refuse(*arguments): raise AssertionError("asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
import torch, ditfast
from ditfast.cli import main
torch.set_num_threads(1)
print(ditfast.__file__)
assert main(["sample", "--out", "samples", "--num", "40", "--steps", "ddim2"]) == 0
assert main(["evaluate", "samples", "--reference", "digits"]) == 0
"""


def run_python(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("PYTHONSAFEPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_no_top_level_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ditfast"}
    for expected in (
        "kernels/layer_norm_modulate.py",
        "benchmarks/bench.py",
        "ops/attention.py",
        "data/digits.safetensors",
        "prediction/counts.json",
        "py.typed",
    ):
        assert f"ditfast/{expected}" in names


def test_the_wheel_samples_and_evaluates_without_a_network(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = run_python(SAMPLE_AND_EVALUATE, cwd=tmp_path, path=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'site' / 'ditfast'}" in done.stdout
    assert "samples: 40 images, ddim, 2 steps" in done.stdout
    assert "Frechet distance" in done.stdout


def test_kernels_import_as_ours_only() -> None:
    done = run_python("import ditfast.kernels; print(ditfast.kernels.__file__)")
    assert done.returncode == 0, done.stderr
    shadowed = run_python("import kernels")
    assert "Ours is `ditfast.kernels`" in shadowed.stderr


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn imports triton")
def test_import_is_light() -> None:
    done = run_python("import sys, torch; before = set(sys.modules); import ditfast; print(*(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    assert "ditfast.model" in done.stdout.split()
    assert not {"triton", "torch._dynamo", "sklearn", "matplotlib"} & set(done.stdout.split())


def test_pytest_does_not_put_the_root_on_the_path(request: pytest.FixtureRequest) -> None:
    assert request.config.getoption("importmode") == "importlib"


@pytest.mark.parametrize("present", [False, True], ids=["absent", "present"])
@pytest.mark.parametrize("cwd", [ROOT, ROOT.parent], ids=["root", "elsewhere"])
def test_diffusers_imports_with_hugging_faces_kernels(present: bool, cwd: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    if present:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(*args, **kwargs): ...\n")
        (tmp_path / "kernels-0.17.2.dist-info").mkdir()
        (tmp_path / "kernels-0.17.2.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n"
        )
    done = run_python(IMPORT_DIFFUSERS, cwd=cwd, path=tmp_path)
    assert done.stdout.strip() == "DiTTransformer2DModel", done.stderr
    done = run_python("from kernels import get_kernel; print(get_kernel.__name__)", cwd=cwd, path=tmp_path)
    if cwd == ROOT:
        assert "Ours is `ditfast.kernels`; for Hugging Face's package `kernels`, leave this directory" in done.stderr
    else:
        assert (done.stdout.strip() == "get_kernel") == present
