"""Every command and example of README and docs runs as printed, with sizes cut by the substitutions below."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm_style
import torch
from extraction import photographs
from guides import GUIDES, ROOT, Step, steps, words_of
from inception_stand_in import install
from support import randomize
from tiny_vae import tiny

import ditfast
from ditfast import DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.cli import main
from ditfast.evaluation.inception import URL
from ditfast.images import save_npz
from ditfast.ops.cpu_chain import check_int8
from ditfast.training import evaluation

TINY: dict[str, Any] = {"depth": 1, "hidden_size": 384, "num_heads": 6}
FID_IMAGES = 9

# What stands in a guide, and what runs in its place; each is used.
CUTS = {
    "README.md": {
        "--num-images 50000": f"--num-images {FID_IMAGES} --steps 2",
        "--per-class 4": "--per-class 4 --steps 2",
        "--image-size 256": "--image-size 8",
        "--steps 400000": "--steps 2 --batch 4",
        "--steps 5000 --out run --evaluate-every 1000 --sample-every 1000": (
            "--steps 1 --batch 4 --out run --evaluate-every 1 --sample-every 1"
        ),
    },
    "sampling.md": {
        "ditfast sample --out digits.png": "ditfast sample --out digits.png --steps 2",
        "--per-class 4": "--per-class 4 --steps 2",
        "--steps ddim50": "--steps ddim2",
        'input_size=64, dtype="bf16", device="cuda"': 'input_size=8, dtype="bf16", device="cpu"',
        '"ddim50", cfg_scale=2.0': '"ddim2", cfg_scale=2.0',
        'GaussianDiffusion("ddim50")': 'GaussianDiffusion("ddim2")',
        "--num-images 50000": f"--num-images {FID_IMAGES} --steps 2",
        "--num 1000": "--num 80 --steps 2",
    },
    "training.md": {
        "--steps 5000 --out run --evaluate-every 1000 --sample-every 1000": (
            "--steps 2 --batch 4 --out run --evaluate-every 2 --sample-every 2"
        ),
        "--per-class 8": "--per-class 8 --steps 2",
        "steps=5000, batch=128": "steps=2, batch=4",
        "--image-size 256": "--image-size 8",
        "--accumulate 8 --workers 4 --steps 400000 --out xl": "--accumulate 2 --steps 2 --batch 4 --out one-gpu",
        "--workers 4 --steps 400000": "--steps 2 --batch 4",
        "--dtype bf16 --steps 400000": "--dtype bf16 --steps 2 --batch 4",
        "--num-images 50000": f"--num-images {FID_IMAGES} --steps 2",
        "--steps 125 --cfg 1.5 --classes 207 360": "--steps 2 --cfg 1.5 --classes 0 1",
        "step-00005000": "step-00000002",
    },
    "cpu.md": {
        "accelerate(model": "accelerate(theirs",
        "--dtype int8": "--dtype int8 --steps 2",
        "-n 200": "-n 2",
    },
}

# What no test of this file runs, and what runs it, or why nothing does.
ELSEWHERE = {
    "README.md": {
        "pip install -e .": "tests/test_packaging.py",
        "pip install -e '.[bench]'": ".ci/run installs",
        "python benchmarks/bench.py": "tests/test_bench_run.py",
        "pip install -e '.[test]'": ".ci/run installs",
        "pytest": ".ci/run",
        "config = ditfast.DiTConfig.from_name": "tests/test_readme.py",
        'model = ditfast.load_checkpoint("DiT-XL-2-256x256.pt")': "tests/test_readme.py",
        "from models import SiT_models": "tests/test_readme.py",
        "from diffusers import DiTPipeline": "tests/test_readme.py",
    },
    "cpu.md": {
        "pytest tests/cpu": ".ci/run",
        "CPU_SANITIZERS=address,undefined": "minutes, and a process of its own; by hand",
        "pytest -m slow tests/cpu/test_races.py": "minutes; by hand",
    },
    "gpu.md": {
        "bash benchmarks/gpu.sh": "tests/test_gpu_script.py",
        "OUT=results MINUTES=30 bash": "tests/test_gpu_script.py",
        "DRY=1 bash": "tests/test_gpu_script.py",
        "pip install -e '.[bench,test]'": ".ci/run installs",
        "ditfast doctor": "tests/test_mains_under_fake_cuda.py",
        "ditfast compile": "tests/test_compile_command.py",
        "pytest -m gpu": "tier full, under a fake GPU",
        "ditfast tune": "tests/test_mains_under_fake_cuda.py",
        "python benchmarks/bench.py": "tests/test_mains_under_fake_cuda.py",
        "pytest benchmarks/kernels.py": "tests/test_kernel_bench.py",
        "python benchmarks/training.py": "tests/test_mains_under_fake_cuda.py",
        "python benchmarks/sampling.py": "tests/test_mains_under_fake_cuda.py",
        "python benchmarks/host.py": "tests/test_host_bench.py",
    },
    "kernels.md": {"python -m ditfast.kernels.inspect": "tests/test_inspect.py"},
    "tuning.md": {"ditfast tune": "tests/test_mains_under_fake_cuda.py"},
}


def is_elsewhere(name: str, step: Step) -> bool:
    return any(start in step.code for start in ELSEWHERE.get(name, ()))


def runnable(name: str) -> list[Step]:
    return [step for step in steps(GUIDES[name]) if not is_elsewhere(name, step)]


def cut(name: str, step: Step, used: set[str]) -> Step:
    code = step.code
    for text, shorter in CUTS[name].items():
        if text in code:
            used.add(text)
            code = code.replace(text, shorter)
    return step._replace(code=code)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a user's folder: photographs, checkpoints, reference images; and stand-ins for what is downloaded or large."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    vae = tiny().eval()
    monkeypatch.setattr("ditfast.vae.load_vae", lambda source: vae)
    monkeypatch.setattr(DiTConfig, "from_name", classmethod(lambda cls, name, **fields: cls(**TINY, **fields)))
    for name, value in (("STEPS", 2), ("DIGITS", 80), ("RECORDS", 8), ("PER_CLASS", 1)):
        monkeypatch.setattr(evaluation, name, value)
    photographs(folder / "imagenet" / "train")
    model = randomize(DiT(DiTConfig(**TINY, input_size=4)))
    torch.save({"ema": model.state_dict(), "args": {"model": "DiT-XL/2"}}, folder / "DiT-XL-2-256x256.pt")
    save_checkpoint(model, folder / "dit-xl", layout="diffusers")
    (folder / "imagenet.txt").write_text("".join(f"class {k}\n" for k in range(999)) + "otter\n")
    real = np.random.default_rng(0).integers(0, 256, (FID_IMAGES, 8, 8, 3)).astype(np.uint8)
    save_npz(folder / "VIRTUAL_imagenet256_labeled.npz", iter(real), [0] * FID_IMAGES)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    install(tmp_path / "checkpoints" / URL.rpartition("/")[2], monkeypatch)
    return folder


def run(step: Step, names: dict[str, Any]) -> None:
    if step.kind == "python":
        exec(step.code, names)
        return
    program, *arguments = words_of(step.code)
    if program == "ditfast":
        assert main(arguments) == 0, step.code
    else:
        assert program == "python", step.code
        subprocess.run([sys.executable, *arguments], check=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["README.md", "sampling.md", "training.md"])
def test_a_guide_runs_from_its_first_line_to_its_last(name: str, user: Path) -> None:
    for needed in ("PIL", "sklearn", "diffusers"):
        pytest.importorskip(needed)
    run_guide(name, {})
    if name == "training.md":
        assert load_checkpoint("mine/model.safetensors").config.prediction == "v"
        assert Path("digits.png").stat().st_size > 0
    assert len(list(Path("fid").glob("0*.png"))) == FID_IMAGES


@pytest.mark.usefixtures("one_thread")
def test_the_cpu_s_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = DiTConfig(**TINY, input_size=4)
    model = randomize(DiT(config)).eval()
    try:
        check_int8("int8", model.parameters())
    except ValueError as error:
        pytest.skip(str(error))
    run_guide("cpu.md", {"ditfast": ditfast, "model": model, "theirs": timm_style.SiT(depth=1, grid=(4, 4)).eval()})


def run_guide(name: str, names: dict[str, Any]) -> None:
    used: set[str] = set()
    for step in runnable(name):
        run(cut(name, step, used), names)
    assert used == set(CUTS[name])


def test_each_step_of_a_guide_is_run_or_named() -> None:
    assert {name for name in GUIDES if runnable(name)} == set(CUTS)
    for name, starts in ELSEWHERE.items():
        codes = [step.code for step in steps(GUIDES[name])]
        for start, where in starts.items():
            assert any(start in code for code in codes), (name, start)
            if where.startswith("tests/"):
                assert (ROOT / where).is_file(), where
