"""The first minutes with ditfast: what it prints and draws without arguments, and what it needs for that."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ditfast.cli import main
from ditfast.images import load_png
from ditfast.threads import one_thread

TESTS = Path(__file__).resolve().parent
CUT = {
    "ditfast sample": "ditfast sample --steps ddim2 --per-class 1",
    "--steps 5000": "--steps 2 --batch 8",
    "num_layers=2": "num_layers=1, num_attention_heads=2, attention_head_dim=16",
    "--models DiT-S/2": "--models DiT-S/8 --rivals eager --rounds 5 --dtype fp32",
}

# Imports of what is installed, but not brought by ditfast's own dependencies or by a build of torch for CPUs, find nothing.
ONLY_DEPENDENCIES = """
import importlib.metadata, re, sys
from importlib.machinery import PathFinder

loaded_before = set(sys.modules)  # what .pth files of the environment load, such as setuptools'

def normalized(name):
    return re.sub("[-_.]+", "-", name).lower()

def requirements(package, found):
    if package not in found and package not in ("triton", "cuda-bindings", "setuptools") and "nvidia" not in package:
        try:
            required = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            return found
        found.add(package)
        for line in required:
            if "extra ==" not in line:
                requirements(normalized(re.match("[A-Za-z0-9_.-]+", line)[0]), found)
    return found

needed = requirements("ditfast", set())
owners = importlib.metadata.packages_distributions()

class OnlyNeeded:
    def find_spec(name, path=None, target=None):
        if path is None and name in owners and needed.isdisjoint(map(normalized, owners[name])):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyNeeded
import ditfast
from ditfast.cli import main
sys.path.append(sys.argv[1])
import timm_style

assert main(["sample", "--steps", "ddim2"]) == 0
model = timm_style.SiT(depth=2, grid=(4, 4)).eval()
ditfast.accelerate(model)
assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
assert main(["doctor"]) == 0
assert main(["compile", "--arch", "sm_90", "--model", "digits"]) == 2
foreign = {name.split(".")[0] for name in sys.modules.keys() - loaded_before} & owners.keys()
print("foreign", *(name for name in foreign if needed.isdisjoint(map(normalized, owners[name]))))
"""


def beginning(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main([]) == 0
    lines = capsys.readouterr().out.replace(" \\\n", " ").splitlines()
    return [line.strip() for line in lines if line.startswith("  ")]


def test_without_arguments_it_prints_five_commands_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "matplotlib", "diffusers"):
        pytest.importorskip(module)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.chdir(tmp_path)
    lines = beginning(capsys)
    assert len(lines) == 5
    cut = set(CUT)
    for line in lines:
        for long, short in CUT.items():
            cut -= {long} if long in line else set()
            line = line.replace(long, short)
        program, *arguments = shlex.split(line)
        if program == "python":
            assert arguments[0] == "-c"
            exec(arguments[1], {})
        else:
            with one_thread():
                assert main(arguments) == 0, line
    assert not cut
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "run", "bench-results"}
    assert "swapped" in capsys.readouterr().out


def test_the_lines_run_where_no_script_is_on_the_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    lines = beginning(capsys)
    assert len(lines) == 5
    assert all(line.startswith(("python -m ditfast ", "python -c ")) for line in lines)


def test_sample_without_out_takes_a_free_name_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.png").write_text("a stranger's")
    quick = ["--steps", "ddim2", "--per-class", "1"]
    with one_thread():
        for name in ("digits-2.png", "digits-3.png"):
            assert main(["sample", *quick]) == 0
            assert capsys.readouterr().out.startswith(f"{name}: 10 images, ")
            assert load_png(tmp_path / name).ndim == 3
    assert (tmp_path / "digits.png").read_text() == "a stranger's"
    assert main(["sample", "--num", "3"]) == 2
    assert capsys.readouterr().err == "ditfast sample: --out: got none, but --num needs a folder\n"
    (tmp_path / "closed").mkdir(mode=0o555)
    monkeypatch.chdir(tmp_path / "closed")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert main(["sample", *quick]) == 2
    assert capsys.readouterr().err == (
        "ditfast sample: --out: got 'digits.png', but no file can be written there: Permission denied\n"
    )


def test_triton_is_left_to_builds_of_torch() -> None:
    (required,) = re.findall(
        r"^dependencies = \[(.*?)\]", (TESTS.parent / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    assert re.findall(r'"(\w+)', required) == ["torch", "numpy", "safetensors", "rich"]


def test_sampling_and_accelerate_need_no_more_than_is_installed_with_a_torch_for_cpus(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONLY_DEPENDENCIES, str(TESTS)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "digits.png: 100 images" in done.stdout
    assert done.stdout.splitlines()[-1] == "foreign"
    assert done.stderr == (
        "ditfast compile: backend 'triton' needs the package triton, which is not installed: pip install triton (Linux)\n"
    )
