"""What gets installed, and that our kernels/ stays out of the way of Hugging Face's package of that name."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import copy_checkout, make_environment

ROOT = Path(__file__).resolve().parents[1]

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


def run_python(
    code: str, *, cwd: Path = ROOT, path: Path | None = None, python: Path = Path(sys.executable)
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("PYTHONSAFEPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([str(python), "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "source")
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


# ------------------------------------------------------------------------------------------------ editable installs
@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which a copy of the checkout is installed as README says, without a network."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("editable")
    python = make_environment(folder / "environment")
    source = copy_checkout(folder / "clone")
    options = ["-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [str(python), "-m", "pip", "install", *options, "-e", str(source)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def test_an_editable_install_is_a_path_to_a_folder_that_holds_ditfast_alone(editable: Path) -> None:
    (pth,) = editable.parents[1].glob("lib/python3*/site-packages/__editable__*.pth")
    (entry,) = pth.read_text().split()
    assert os.listdir(entry) == ["ditfast"]
    for name in ("", "ops", "kernels", "benchmarks"):  # as type checkers look: they run no import hook
        assert (Path(entry) / "ditfast" / name / "__init__.py").is_file()


def test_an_editable_install_adds_one_top_level_module(editable: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, ditfast.benchmarks, ditfast.kernels
specs = [importlib.util.find_spec(name) for name in ("ditfast", "kernels", "benchmarks", "tests")]
print(*(spec.origin for spec in specs if spec))
if importlib.util.find_spec("diffusers"):
    import diffusers
    diffusers.DiTTransformer2DModel
"""
    done = run_python(code, cwd=tmp_path, python=editable)
    assert done.returncode == 0, done.stderr
    clone = editable.parents[2] / "clone"
    assert [path for path in done.stdout.split() if path.startswith(str(clone))] == [
        str(clone / ".editable/ditfast/__init__.py")
    ]


def test_an_editable_install_runs_from_the_clone(editable: Path) -> None:
    clone = editable.parents[2] / "clone"
    done = run_python("import ditfast.kernels; print(ditfast.kernels.__file__)", cwd=clone, python=editable)
    assert done.stdout == f"{clone / 'ditfast' / 'kernels' / '__init__.py'}\n", done.stderr
    command = [str(editable), "benchmarks/bench.py", "--help"]
    assert subprocess.run(command, cwd=clone, capture_output=True, check=False).returncode == 0


@pytest.mark.full
def test_a_users_script_passes_mypy_strict_after_an_editable_install(editable: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_bytes((ROOT / "examples/train_on_digits.py").read_bytes())
    (tmp_path / "misspelled.py").write_text('import ditfast\n\nditfast.training.TrainSettings(steps="1")\nditfast.trainin\n')
    command = [str(editable), "-m", "mypy", "--strict", "script.py", "misspelled.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    *faults, summary = done.stdout.splitlines()
    assert summary == "Found 2 errors in 1 file (checked 2 source files)", done.stdout + done.stderr
    assert 'misspelled.py:3: error: Argument "steps" to "TrainSettings" has incompatible type "str"' in faults[0]
    assert 'misspelled.py:4: error: Module has no attribute "trainin"; maybe "training"?' in faults[1]


# ------------------------------------------------------------------------------------------------ imports
# As a person writes them, and as libraries guard them: nothing is installed under that name, and the error says what was found.
IMPORTS_OF_KERNELS = """
import importlib, importlib.util, pickle, sys
message = "Ours is `ditfast.kernels`; for Hugging Face's package `kernels`, run `pip install kernels`"

def refused(code, kind=ModuleNotFoundError):
    try:
        exec(code)
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(code)

statements = ["import kernels", "from kernels import get_kernel", "import kernels.attention", "import kernels as k",
              "from kernels.layer import Linear", "importlib.util.find_spec('kernels.layer')"]
for statement in statements * 2:
    refused(statement)
assert "kernels" not in sys.modules
empty = importlib.import_module("kernels")  # transformers' last resort
refused("empty.attention", AttributeError)
refused("from kernels import get_kernel")
refused("importlib.import_module('kernels.layer')")
assert pickle.loads(pickle.dumps(sum)) is sum
print(hasattr(empty, "attention"), "torch" in sys.modules)
"""


def test_from_the_root_kernels_imports_nothing_of_ours() -> None:
    done = run_python("import ditfast.kernels; print(ditfast.kernels.__file__)")
    assert done.returncode == 0, done.stderr
    done = run_python(IMPORTS_OF_KERNELS)
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn imports triton")
def test_import_is_light() -> None:
    done = run_python("import sys, torch; before = set(sys.modules); import ditfast; print(*(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    assert "ditfast.model" in done.stdout.split()
    assert not {"triton", "torch._dynamo", "sklearn", "matplotlib"} & set(done.stdout.split())


def test_pytest_does_not_put_the_root_on_the_path(request: pytest.FixtureRequest) -> None:
    assert request.config.getoption("importmode") == "importlib"


def install_kernels(folder: Path) -> None:
    """Install a stand-in for Hugging Face's package ``kernels``."""
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("from .utils import get_kernel\n")
    (folder / "kernels" / "utils.py").write_text("def get_kernel(*args, **kwargs): ...\n")
    (folder / "kernels-0.17.2.dist-info").mkdir()
    (folder / "kernels-0.17.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")


LOOK_FOR_KERNELS = """
import importlib, importlib.metadata, importlib.util

# transformers asks for the distribution's version, and without one for the module's.
version = "N/A"
if importlib.util.find_spec("kernels"):
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        version = getattr(importlib.import_module("kernels"), "__version__", version)
get_kernel = None
if version not in ("N/A", "0"):
    from kernels import get_kernel
    from kernels.utils import get_kernel as same
    assert get_kernel is same
"""


# Each imports a model, which loads what the library looks at; diffusers and peft load transformers where it is installed.
LIBRARIES = {"transformers": "CLIPTextModel", "diffusers": "DiTTransformer2DModel", "peft": "LoraConfig"}


@pytest.mark.parametrize("present", [False, True], ids=["absent", "present"])
@pytest.mark.parametrize("cwd", [ROOT, pytest.param(ROOT.parent, marks=pytest.mark.full)], ids=["root", "elsewhere"])
def test_who_looks_for_kernels_finds_hugging_faces(present: bool, cwd: Path, tmp_path: Path) -> None:
    if present:
        install_kernels(tmp_path)
    installed = [library for library in LIBRARIES if importlib.util.find_spec(library)]
    imports = "".join(f"from {library} import {LIBRARIES[library]}\n" for library in installed)
    after = "import ditfast.kernels\nprint(version, get_kernel is not None, callable(ditfast.kernels.attention))"
    done = run_python(LOOK_FOR_KERNELS + imports + after, cwd=cwd, path=tmp_path)
    version = "0.17.2" if present else "0" if cwd == ROOT else "N/A"
    assert done.stdout == f"{version} {present} True\n", done.stderr


def test_two_clones_on_the_path_both_step_aside(tmp_path: Path) -> None:
    (tmp_path / "clone" / "kernels").mkdir(parents=True)
    for name in ("__init__.py", "name_clash.py"):
        (tmp_path / "clone" / "kernels" / name).write_text((ROOT / "kernels" / name).read_text())
    done = run_python(LOOK_FOR_KERNELS + "print(version)", path=tmp_path / "clone")
    assert done.stdout == "0\n", done.stderr
