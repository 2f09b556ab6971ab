"""Reading a file or folder without believing anything about it: not its name, not its pickle, not its length."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..files import visible_entries
from . import pickles
from .errors import CheckpointError, listed, one_line
from .runs import RunWeights, find_run_weights, read_run_weights

CONFIG_FILE = "config.json"
SCHEDULER_FILE = "scheduler_config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS_FILES = (
    WEIGHTS_FILE,
    f"{WEIGHTS_FILE}.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
TRANSFORMER = "transformer"  # the folder of the model in a pipeline's
OFFICIAL_FILE = "model.safetensors"  # the official layout in a folder, as huggingface_hub's mixin and the Trainer name it
_VARIANT = re.compile(r"diffusion_pytorch_model\.((safetensors|bin)\.index\.)?(?P<variant>[\w-]+)\.(safetensors|bin|json)")
_PLAIN_PICKLE = "torch.storage._load_from_bytes"
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_LONGEST_HEADER = 100_000_000  # of safetensors, by its specification
_WHAT_FILES = "a file written by torch.save or safetensors"


class Stored(NamedTuple):
    """Tensors, memory-mapped where possible, a safetensors file's metadata, and the file (None: a state dict in memory).

    ``place`` is where the weights of a training run were found: its exported file, or a checkpoint's folder.
    """

    content: object
    metadata: Mapping[str, str]
    file: Path | None
    place: Path | None = None

    @property
    def config_file(self) -> Path | None:
        """The config.json beside, if there is one."""
        beside = None if self.file is None else self.file.with_name(CONFIG_FILE)
        return beside if beside is not None and beside.is_file() else None


def read(path: Path, variant: str | None = None, weights: str = "auto") -> Stored:
    """Read a file, a folder of ``save_pretrained`` or diffusers or a pipeline with a transformer, or of a training run.

    ``variant`` is part of the names of a folder's weights; ``weights`` are a run's first average, or ``model``.

    Raises:
        CheckpointError: it is none of these, cannot be read, is damaged, or holds code.
    """
    try:
        if path.is_dir():
            found = find_run_weights(path, OFFICIAL_FILE) if variant is None else None
            if found is None:
                return _read_folder(path, variant)
            if found.path.is_file():
                return Stored(*_read_member(found.path), found.path, found.path)
            return Stored(_read_checkpoint(found, path, weights), {}, None, found.path)
        if not path.is_file():
            raise CheckpointError("there is no such file or folder" if not path.exists() else f"expected {_WHAT_FILES}")
        return Stored(*_read_file(path), path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or one_line(str(error))}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raise CheckpointError if the file holds something else."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))  # editors of Windows begin a file with a mark
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: cannot be read as JSON: {one_line(str(error))}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: got a {type(content).__name__}, expected a JSON object")
    return content


def find_weights(folder: Path, variant: str | None) -> Path | None:
    """Return the weights, or the index of their shards, in a folder or in its ``transformer``; None if there are none."""
    places, names = (folder, folder / TRANSFORMER), _weights_files(variant)
    return next((file for place in places for name in names if (file := place / name).is_file()), None)


def with_variant(name: str, variant: str | None) -> str:
    """Return a file's name with the variant before its last ending, as diffusers writes it."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _weights_files(variant: str | None) -> list[str]:
    return [with_variant(name, variant) for name in WEIGHTS_FILES] + ([OFFICIAL_FILE] if variant is None else [])


def _read_checkpoint(found: RunWeights, path: Path, weights: str) -> dict[str, object]:
    try:
        return read_run_weights(found, weights)
    except CheckpointError as error:
        raise CheckpointError(str(error) if found.path == path else f"{found.path.name}: {error}") from error


def _read_folder(folder: Path, variant: str | None) -> Stored:
    file = find_weights(folder, variant)
    if file is not None:
        return Stored(*(_read_shards(file) if file.suffix == ".json" else _read_member(file)), file)
    folder = folder / TRANSFORMER if (folder / TRANSFORMER).is_dir() else folder
    expected = _weights_files(variant)
    names = [entry.name for entry in visible_entries(folder)]
    variants = sorted({found["variant"] for name in names if (found := _VARIANT.fullmatch(name))})
    hint = "".join(f"; give variant={other!r}, or the file's own path" for other in variants[:1])
    if "log.jsonl" in names:
        raise CheckpointError("got a training run without a checkpoint yet: it writes one every --save-every steps")
    held = listed(names) or "nothing"
    raise CheckpointError(f"got a folder that holds {held}, expected {' or '.join(expected)}, or transformer/ with one{hint}")


def _read_shards(index: Path) -> tuple[dict[str, object], Mapping[str, str]]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
        raise CheckpointError(f"{index.name}: expected a weight_map from tensors to files beside it")
    content: dict[str, object] = {}
    for file in sorted(set(files.values())):
        shard, _ = _read_member(index.parent / file)
        if not isinstance(shard, dict):
            raise CheckpointError(f"{file}: got a {type(shard).__name__}, expected a dict of tensors")
        content |= shard
    return content, {}


def _read_member(file: Path) -> tuple[object, Mapping[str, str]]:
    try:
        return _read_file(file)
    except (CheckpointError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{file.name}: {reason}") from error


def _read_file(path: Path) -> tuple[object, Mapping[str, str]]:
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise CheckpointError(f"got an empty file, expected {_WHAT_FILES}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:  # first: a length can begin like a pickle
        return _read_safetensors(path)
    if head.startswith((_ZIP, _PICKLE)):
        return _read_torch(path, zipped=head.startswith(_ZIP)), {}
    raise CheckpointError(f"got a file that begins with {head!r}, expected {_WHAT_FILES}")


def _read_safetensors(path: Path) -> tuple[dict[str, object], Mapping[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"truncated or damaged safetensors: {one_line(str(error))}") from error


def _read_torch(path: Path, zipped: bool) -> object:
    """Return what torch.save wrote, by torch's own reader, and by ours where it knows no such protocol or type.

    Ours comes second, after torch's has refused what is an archive of code (TorchScript) and no pickle.
    """
    mapped = zipped and path.suffix != ".safetensors"  # torch.load believes that name, whatever the file holds
    options: dict[str, Any] = {"map_location": "cpu", "mmap": mapped}
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused in one line below
            try:
                return torch.load(str(path) if mapped else file, weights_only=True, **options)
            except pickle.UnpicklingError:
                file.seek(0)
                return torch.load(str(path) if mapped else file, weights_only=False, pickle_module=pickles, **options)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(_why_refused(error)) from error


def _why_refused(error: Exception) -> str:
    message = str(error)
    if "TorchScript" in message:
        return "refused: it is a TorchScript archive, which holds code, expected a state dict written by torch.save"
    if "explicit pickle_module" in message:
        return "refused: it holds more than weights, which TORCH_FORCE_WEIGHTS_ONLY_LOAD forbids: unset it"
    if not isinstance(error, pickles.Refused):
        return f"truncated or damaged: {one_line(message)}"
    if message == _PLAIN_PICKLE:
        return "refused: it was written by pickle.dump, which makes code of tensors, expected a file of torch.save"
    return f"refused: it holds {message}, expected tensors, plain values and what training scripts save beside them"
