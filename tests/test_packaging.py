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


def run_python(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("PYTHONSAFEPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_no_top_level_kernels(tmp_path: Path) -> None:
    pytest.importorskip("build")
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ditfast"}
    for expected in (
        "kernels/layer_norm_modulate.py",
        "benchmarks/bench.py",
        "ops/attention.py",
        "data/digits.safetensors",
        "py.typed",
    ):
        assert f"ditfast/{expected}" in names


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
