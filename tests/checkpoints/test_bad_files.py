"""Files that are no checkpoints: one error from the API, one line and exit code 2 from the command line."""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_files import saved, small, weights_of

from ditfast import CheckpointError, load_checkpoint
from ditfast.cli import main

STATE = weights_of(small())
MARK = "the-pickle-ran"


class Code:
    """A pickle that leaves a mark where it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (MARK,)


def changed(**values: object) -> dict[str, object]:
    return {**STATE, **{name.replace("__", "."): value for name, value in values.items()}}


def poisoned(value: float) -> dict[str, object]:
    bias = STATE["blocks.1.attn.proj.bias"].clone()
    bias[7] = value
    return {**STATE, "blocks.1.attn.proj.bias": bias}


def without(*names: str) -> dict[str, object]:
    return {name: value for name, value in STATE.items() if name not in names}


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated_torch(folder: Path, **options: object) -> Path:
    whole = saved(STATE, folder / "whole.pt", **options).read_bytes()
    return write_bytes(folder / "x.pt", whole[: len(whole) // 2])


def truncated_safetensors(folder: Path, length: int) -> Path:
    safetensors.torch.save_file(STATE, folder / "whole.safetensors")
    return write_bytes(folder / "x.safetensors", (folder / "whole.safetensors").read_bytes()[:length])


def torchscript(folder: Path) -> Path:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "x.pt")
    return folder / "x.pt"


def folder_of(folder: Path, **files: str) -> Path:
    place = folder / "model"
    place.mkdir()
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(content)
    return place


def unet(folder: Path) -> Path:
    names = ("conv_in.weight", "conv_in.bias", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight")
    return saved({name: torch.zeros(3) for name in names}, folder / "x.pt")


def expanded(folder: Path) -> Path:
    """A few bytes that claim to be four terabytes."""
    return saved(changed(blocks__0__mlp__fc1__weight=torch.zeros(1).expand(1_000_000, 1_000_000)), folder / "x.pt")


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing-path": (lambda f: f / "no.pt", "there is no such file or folder"),
    "empty-file": (
        lambda f: write_bytes(f / "x.pt", b""),
        "got an empty file, expected a file written by torch.save or safetensors",
    ),
    "text": (
        lambda f: write_bytes(f / "x.pt", b"Hello, this is text.\n" * 9),
        "got a file that begins with b'Hello, this is t'",
    ),
    "json": (lambda f: write_bytes(f / "x.pt", b'{"a":1,\n{"b": 2}\n}'), "got a file that begins with"),
    "text-pickle": (lambda f: write_bytes(f / "x.pt", b"cos\nsystem\n(S'true'\ntR."), "got a file that begins with b.cos"),
    "truncated-pt": (truncated_torch, "truncated or damaged: PytorchStreamReader failed"),
    "truncated-legacy-pt": (
        lambda f: truncated_torch(f, _use_new_zipfile_serialization=False),
        "truncated or damaged: unexpected EOF",
    ),
    "no-zip-after-all": (lambda f: write_bytes(f / "x.pt", b"PK\x03\x04" + b"0" * 99), "truncated or damaged: PytorchStream"),
    "truncated-safetensors": (lambda f: truncated_safetensors(f, -1), "truncated or damaged safetensors: .*not fully covered"),
    "truncated-safetensors-header": (
        lambda f: truncated_safetensors(f, 99),
        "truncated or damaged safetensors: .*header length",
    ),
    "code": (lambda f: saved({**STATE, "args": Code()}, f / "x.pt"), r"refused: it holds \w+\.mkdir, expected tensors"),
    "code-legacy": (
        lambda f: saved({**STATE, "args": Code()}, f / "x.pt", _use_new_zipfile_serialization=False),
        r"refused: it holds \w+\.mkdir",
    ),
    "code-in-a-plain-pickle": (
        lambda f: write_bytes(f / "x.pt", pickle.dumps(Code(), 2)),
        "refused: it holds|truncated or damaged",
    ),
    "numpy": (lambda f: saved({**STATE, "rng": np.zeros(3)}, f / "x.pt"), r"refused: it holds numpy\S+reconstruct, expected"),
    "module": (lambda f: saved(torch.nn.Linear(2, 2), f / "x.pt"), r"refused: it holds torch\.nn\.modules\.linear\.Linear"),
    "torchscript": (torchscript, "refused: it is a TorchScript archive"),
    "list": (lambda f: saved([1, 2], f / "x.pt"), "got a list, expected a dict of tensors"),
    "nothing-in-it": (lambda f: saved({}, f / "x.pt"), "this is no DiT: .* found nothing"),
    "unet": (unet, r"this is no DiT: looked for x_embedder\.proj\.weight, .* found conv_in\.weight, conv_in\.bias, time_emb"),
    "nan": (lambda f: saved(poisoned(torch.nan), f / "x.pt"), r"not finite blocks\.1\.attn\.proj\.bias \(1 of 48 values\)$"),
    "infinite": (
        lambda f: saved(poisoned(-torch.inf), f / "x.pt"),
        r"not finite blocks\.1\.attn\.proj\.bias \(1 of 48 values\)$",
    ),
    "missing": (
        lambda f: saved(without("blocks.0.mlp.fc1.weight", "final_layer.linear.bias"), f / "x.pt"),
        r"missing blocks\.0\.mlp\.fc1\.weight, final_layer\.linear\.bias$",
    ),
    "unexpected": (lambda f: saved(changed(extra=torch.zeros(3), epoch=4), f / "x.pt"), "unexpected extra, epoch$"),
    "unprintable": (lambda f: saved({**STATE, "a\nb\x1b[31m": 1}, f / "x.pt"), r"unexpected 'a\\nb\\x1b\[31m'$"),
    "patches-not-square": (
        lambda f: saved(changed(x_embedder__proj__weight=torch.zeros(48, 16)), f / "x.pt"),
        r"x_embedder\.proj\.weight: got shape \(48, 16\), expected \[D, C, p, p\]$",
    ),
    "output-of-no-patch": (
        lambda f: saved(changed(final_layer__linear__weight=torch.zeros(40, 48)), f / "x.pt"),
        r"final_layer\.linear\.weight: got 40 rows, expected 16, or 32 with learned variances",
    ),
    "complex": (
        lambda f: saved({name: value.cfloat() for name, value in STATE.items()}, f / "x.pt"),
        r"of another dtype .* \(got torch\.complex64, expected float32, float16 or bfloat16\), .* and \d+ more$",
    ),
    "mixed-dtypes": (
        lambda f: saved(changed(final_layer__linear__bias=STATE["final_layer.linear.bias"].half()), f / "x.pt"),
        r"of another dtype final_layer\.linear\.bias \(got torch\.float16, expected torch\.float32\)$",
    ),
    "sparse": (
        lambda f: saved(changed(pos_embed=STATE["pos_embed"].to_sparse()), f / "x.pt"),
        "no dense tensor pos_embed$",
    ),
    "meta": (lambda f: saved(changed(pos_embed=STATE["pos_embed"].to("meta")), f / "x.pt"), "no dense tensor pos_embed$"),
    "claims-terabytes": (expanded, r"no dense tensor blocks\.0\.mlp\.fc1\.weight$"),
    "odd-heads": (lambda f: saved(STATE, f / "x.pt"), "num_heads: unknown"),
    "empty-folder": (folder_of, "got a folder that holds nothing, expected diffusion_pytorch_model.safetensors or"),
    "another-folder": (
        lambda f: folder_of(f, README__md="x", config__json="{}"),
        r"got a folder that holds README\.md, config\.json, expected diffusion_pytorch_model",
    ),
    "folder-of-what-systems-leave-behind": (
        lambda f: folder_of(f, Thumbs__db="", __DS_Store="", ___diffusion_pytorch_model__safetensors=""),
        "got a folder that holds nothing, expected diffusion_pytorch_model",
    ),
    "folder-with-empty-weights": (
        lambda f: folder_of(f, diffusion_pytorch_model__bin=""),
        r"diffusion_pytorch_model\.bin: got an empty file",
    ),
    "index-of-nothing": (
        lambda f: folder_of(f, diffusion_pytorch_model__safetensors__index__json="[]"),
        r"index\.json: got a list, expected a JSON object",
    ),
    "index-outside": (
        lambda f: folder_of(f, diffusion_pytorch_model__bin__index__json='{"weight_map": {"a": "../x"}}'),
        r"index\.json: expected a weight_map from tensors to files beside it",
    ),
    "index-no-json": (
        lambda f: folder_of(f, diffusion_pytorch_model__bin__index__json="weights"),
        r"index\.json: cannot be read as JSON: Expecting value",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_error_and_one_line(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, fault = BAD[kind]
    path = build(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=fault) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    capfd.readouterr()
    assert main(["convert", str(path), str(tmp_path / "out.safetensors"), "--to", "official"]) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert errors == f"ditfast convert: {caught.value}\n"
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / MARK).exists(), "code in the file ran"
    assert not (tmp_path / "out.safetensors").exists()


def test_the_mark_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.load(saved({"args": Code()}, tmp_path / "x.pt"), weights_only=False)
    assert (tmp_path / MARK).is_dir()


def test_exit_code_of_the_command(tmp_path: Path) -> None:
    path = truncated_safetensors(tmp_path, -5)
    script = Path(sys.executable).with_name("ditfast")
    done = subprocess.run(
        [script, "convert", path, tmp_path / "x", "--to", "diffusers"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"ditfast convert: {path}: truncated or damaged safetensors")
    assert done.stderr.count("\n") == 1


def test_damaged_at_random(tmp_path: Path) -> None:
    """Whatever bytes are changed, a model or one error comes back."""
    random = np.random.default_rng(0)
    safetensors.torch.save_file(STATE, tmp_path / "whole.safetensors")
    wholes = [
        saved({"ema": STATE}, tmp_path / "whole.pt").read_bytes(),
        saved({"ema": STATE}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False).read_bytes(),
        (tmp_path / "whole.safetensors").read_bytes(),
        saved({"ema": STATE, "best": np.float64(2)}, tmp_path / "whole.pt", pickle_protocol=4).read_bytes(),
    ]
    loaded = 0
    for trial in range(80):
        damaged = bytearray(wholes[trial % len(wholes)])
        start = 0 if trial // 4 % 2 else max(0, len(damaged) - 8000)  # headers are at the front, a zip's directory at the end
        for place in random.integers(start, min(start + 8000, len(damaged)), 8):
            damaged[place] = random.integers(256)
        with contextlib.suppress(CheckpointError):
            load_checkpoint(write_bytes(tmp_path / "x", bytes(damaged)), config=small())
            loaded += 1
    assert loaded < 54
