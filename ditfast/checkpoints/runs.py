"""Weights of a training run, from its folder or one of its checkpoints, read without processes that talk to each other.

A run's checkpoint is a folder ``step-00001000``: what torch.distributed.checkpoint wrote, of as many ranks as there were, and
``manifest.json`` with the size and hash of each file. Its index is a pickle, of which only torch's own records are made; of the
rest only tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, one_line
from .trained_for import TRAINED_FOR_KEY

CHECKPOINTS = "checkpoints"  # the folder of them in a run's
MANIFEST = "manifest.json"
INDEX = ".metadata"  # as torch.distributed.checkpoint names it
STEP_PREFIX = "step-"
_STEP = re.compile(STEP_PREFIX + r"(\d{8,})")
_INDEX_MODULE = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
}


def find_steps(folder: Path) -> list[tuple[int, Path]]:
    """Return number and path of each checkpoint in a folder, in order, damaged ones too; none if there is no such folder."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))
    return [(step, folder / f"{STEP_PREFIX}{step:08d}") for step in steps]


def checked_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Raises:
        OSError, ValueError: it is not whole; with the reason.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        is_intact = manifest.pop("sha256") == sha256_of(manifest)
        files = {name: (file["size"], file["sha256"]) for name, file in manifest["files"].items()}
        if not isinstance(manifest["about"], dict):
            raise TypeError("about")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    if not is_intact:
        raise ValueError(f"{MANIFEST} does not match its checksum")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, expected {size}")
        if sha256(file) != digest:
            raise ValueError(f"{name} does not match its checksum")
    return manifest


def sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def sha256_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class RunWeights(NamedTuple):
    """Weights that a run's folder stands for: a file, or a checkpoint's folder with its manifest, if that was read already."""

    path: Path
    manifest: dict[str, Any] | None = None


def find_run_weights(folder: Path, exported: str) -> RunWeights | None:
    """Return what a run's folder stands for: the weights that it exported or its newest whole checkpoint, if that is newer.

    A warning names newer checkpoints that are not whole, and a checkpoint that is taken though there are exported weights.

    Args:
        folder: of a run, of a run's checkpoints, or a checkpoint, which stands for itself.
        exported: name of the file of exported weights.

    Returns:
        None if the folder is no run's, or one without checkpoints.

    Raises:
        CheckpointError: no checkpoint is whole, and nothing was exported.
    """
    if _STEP.fullmatch(folder.name) or all((folder / name).exists() for name in (MANIFEST, INDEX)):
        return RunWeights(folder)
    file = folder / exported if (folder / exported).is_file() else None
    faults = []
    for step, path in reversed(find_steps(folder / CHECKPOINTS) or find_steps(folder)):
        if file is not None and not _is_newer(step, path, file):
            break
        try:
            manifest = checked_manifest(path)
        except (OSError, ValueError) as error:
            faults.append(f"{path.name}: {fault_of(error)}")
            warnings.warn(f"{path}: not a whole checkpoint: {fault_of(error)}", stacklevel=2)
            continue
        if file is not None:
            warnings.warn(f"{path}: taken, as it is newer than {file}", stacklevel=2)
        return RunWeights(path, manifest)
    if faults and file is None:
        raise CheckpointError(f"no checkpoint in it is whole: {'; '.join(faults)}")
    return RunWeights(file) if file is not None and (faults or find_steps(folder / CHECKPOINTS)) else None


def read_run_weights(place: RunWeights, weights: str) -> dict[str, object]:
    """Return what a run's checkpoint holds of the model: one set of weights under its name, their config and record.

    Args:
        place: of the checkpoint.
        weights: ``ema``, the first average, also for ``auto``; or ``model``, the weights as they are trained.

    Raises:
        CheckpointError: it is not whole, or no checkpoint of a run of ours.
    """
    path = place.path
    try:
        manifest = place.manifest or checked_manifest(path)
        about = manifest["about"]
        settings = about["settings"]
        config, decay = settings["model"], str(settings["ema"][0])
        files = {file.name for file in path.iterdir()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not a whole checkpoint: {fault_of(error)}{_other_checkpoint(path)}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST}: not of a run of ditfast train") from error
    name = "model" if weights == "model" else "ema"
    content: dict[str, object] = {name: _tensors(path, files, None if name == "model" else decay)}
    record = about.get(TRAINED_FOR_KEY) or {**_earlier_record(settings, config), "step": manifest["step"]}
    return {**content, "config": config, TRAINED_FOR_KEY: record, "step": manifest["step"]}


def fault_of(error: BaseException) -> str:
    """Return on one line why a file cannot be read or written."""
    return one_line((isinstance(error, OSError) and error.strerror) or str(error))


def _other_checkpoint(path: Path) -> str:
    for _, other in reversed(find_steps(path.parent)):
        try:
            checked_manifest(other)
        except (OSError, ValueError):
            continue
        return f"; the newest whole one is {other}"
    return ""


def _is_newer(step: int, path: Path, file: Path) -> bool:
    """True if a checkpoint is of a later step than exported weights, which those of earlier versions do not say."""
    try:
        with safe_open(file, framework="pt") as opened:
            exported = json.loads((opened.metadata() or {}).get(TRAINED_FOR_KEY, "{}")).get("step")
    except (OSError, ValueError, AttributeError, SafetensorError):
        exported = None
    if isinstance(exported, int):
        return step > exported
    manifest = path / MANIFEST
    return manifest.exists() and manifest.stat().st_mtime > file.stat().st_mtime


def _earlier_record(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the settings of a run say it trained for, whose checkpoints of earlier versions do not hold the record."""
    is_flow = settings.get("loss") == "flow"
    return {
        "prediction": "velocity" if is_flow else config.get("prediction", "epsilon"),
        "schedule": settings.get("path", "linear") if is_flow else "linear",
        "learned_variance": settings.get("loss") == "hybrid" and bool(config.get("learn_sigma", True)),
        "loss": settings.get("loss"),
    }


class _IndexUnpickler(pickle.Unpickler):
    """Reader of an index, which makes torch's records of tensors and files, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        from torch.distributed.checkpoint import metadata

        known = f"{module}.{name}" in _INDEX_NAMES
        if module == _INDEX_MODULE and "." not in name:
            value = getattr(metadata, name, None)
            known = isinstance(value, type) and value.__module__ == _INDEX_MODULE
        elif module == "torch" and "." not in name:
            known = known or isinstance(getattr(torch, name, None), torch.dtype)
        elif module.partition(".")[0] == "pathlib":  # where the checkpoint was written
            return PurePosixPath
        if not known:
            raise pickle.UnpicklingError(f"refused: its index holds {module}.{name}, expected names, shapes and places only")
        return super().find_class(module, name)


def _read_index(path: Path, files: set[str]) -> Any:
    """Return torch's ``Metadata`` of a checkpoint, whose tensors are all in its files; any error says that it is damaged."""
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    with (path / INDEX).open("rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise ValueError("its index is none of torch.distributed.checkpoint")
    index.storage_meta = index.storage_meta or StorageMeta()
    if strange := {place.relative_path for place in index.storage_data.values()} - files:
        raise ValueError(f"its index names {sorted(strange)[0]}, which is none of its files")
    return index


def _tensors(path: Path, files: set[str], decay: str | None) -> dict[str, Tensor]:
    """Return the model's tensors: trained ones of an average, if its decay is given, and the rest as they are."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(checkpoint.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return index

    try:
        index = _read_index(path, files)
        names: dict[str, str] = {}
        for key, parts in index.planner_data.items():
            if parts[:-1] == ("model",):
                names.setdefault(parts[-1], key)
            elif decay is not None and parts[:-1] == ("averages", decay):
                names[parts[-1]] = key
        wanted = {name: (key, index.state_dict_metadata[key]) for name, key in names.items()}
        tensors = {name: item for name, (_, item) in wanted.items() if isinstance(item, TensorStorageMetadata)}
        room = sum(file.stat().st_size for file in path.iterdir())
        if sum(item.size.numel() * item.properties.dtype.itemsize for item in tensors.values()) > room:
            raise ValueError("its index claims more than its files hold")
        state = {wanted[name][0]: torch.empty(item.size, dtype=item.properties.dtype) for name, item in tensors.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # disabled or uninitialized: no other process is needed
            checkpoint.load(state, storage_reader=Reader(path), no_dist=True)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if not isinstance(failure, Exception):  # Ctrl-C
            raise failure from None
        raise CheckpointError(f"cannot be read: {fault_of(failure)}") from error
    except Exception as error:  # a pickle of strangers may fail in any way
        raise CheckpointError(f"cannot be read: {fault_of(error)}") from error
    return {name: state[key] for name, (key, _) in wanted.items() if name in tensors}
