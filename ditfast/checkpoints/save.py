"""From a fast model to a file or folder, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..argument_checks import check_choice, check_type
from ..config import DiTConfig
from ..files import PART, check_room, whole_file, without_positions
from ..model import DiT
from .check import POSITIONS, checked
from .configs import to_content, to_diffusers_config, to_json, to_metadata
from .errors import CheckpointError, one_line
from .files import CONFIG_FILE, OFFICIAL_FILE, WEIGHTS_FILE, WEIGHTS_FILES, read_json
from .layouts import LAYOUTS, largest_difference, positions_like, same_bits, to_diffusers
from .source import stated_training_of
from .trained_for import TrainedFor

Writer: TypeAlias = Callable[[Path, dict[str, Tensor], DiTConfig, TrainedFor | None], None]


def save_checkpoint(model: DiT, path: str | os.PathLike[str], *, layout: str = "official") -> None:
    """Write a model's weights as official code or as diffusers reads them.

    Every file holds the config too, flavour included, and loads back exactly: safetensors in its metadata, a ``.pt`` file
    beside its weights, which are under ``ema``, where official code looks first. Beside it stands what the model was trained
    for, where its ``source`` states that. Nothing is written unless all of it is:
    what was at ``path`` stays until then.

    Args:
        model: its weights and its config.
        path: official: a file, named ``.safetensors``, ``.pt`` or ``.pth``, replaced if it exists. diffusers: a new folder.
        layout: ``official`` or ``diffusers``.

    Raises:
        CheckpointError: diffusers' class cannot hold this model (other conditioning designs, grids that are not square, an
            ``mlp_ratio`` other than 4, no row for no class, positions of its own); the model's weights are not a DiT's own,
            or not finite; or the path cannot be written.
        ValueError: the model is no ``ditfast.DiT``, or ``layout`` is none of these.
        TypeError: an argument of the wrong kind; the message names it.
    """
    if not isinstance(model, DiT):
        raise ValueError(f"model: got a {type(model).__name__}, expected a ditfast.DiT")
    check_type("path", path, (str, os.PathLike), "a path")
    check_choice("layout", layout, LAYOUTS)
    path = Path(path)
    with _one_error(path):
        writers: dict[str, Writer] = {".safetensors": _write_safetensors, ".pt": _write_torch, ".pth": _write_torch}
        if layout == "official" and path.suffix not in writers:
            raise CheckpointError(f"expected a name that ends in {', '.join(writers)} for the official layout")
        if not path.parent.is_dir():
            raise CheckpointError(f"the folder {path.parent} does not exist")
        if layout == "official" and path.is_dir():
            raise CheckpointError("is a folder, expected a file")
        if layout == "diffusers" and os.path.lexists(path):
            raise CheckpointError("exists already, expected the name of a new folder")
        state = checked_state(model)
        if layout == "diffusers":
            check_expressible(state, model.config)
        check_room(path, sum(value.nbytes for value in state.values()), "weights")
        write = writers[path.suffix] if layout == "official" else _write_diffusers_folder
        with whole_file(path) as temporary:
            write(temporary, state, model.config, stated_training_of(model))


def save_folder(model: DiT, folder: str | os.PathLike[str]) -> None:
    """Write a folder in diffusers' layout, or in the official one with its config.json where diffusers cannot hold the model.

    The folder is made with its parents; in one that exists the model's files are replaced one by one, and others stay.

    Raises:
        CheckpointError: the model's weights are not a DiT's own, or not finite; or the folder cannot be written.
        TypeError: the folder is no path.
    """
    check_type("folder", folder, (str, os.PathLike), "a path")
    folder = Path(folder)
    with _one_error(folder):
        state = checked_state(model)
        write: Writer = _write_diffusers_folder
        try:
            check_expressible(state, model.config)
        except CheckpointError:
            write = _write_official_folder
        check_room(folder, sum(value.nbytes for value in state.values()), "weights")
        folder.mkdir(parents=True, exist_ok=True)
        shards = {shard for name in WEIGHTS_FILES if name.endswith(".index.json") for shard in _shards(folder / name)}
        with tempfile.TemporaryDirectory(prefix=".", suffix=PART, dir=folder) as temporary:
            write(written := Path(temporary) / "new", state, model.config, stated_training_of(model))
            names = {file.replace(folder / file.name).name for file in written.iterdir()}
        for stale in {*WEIGHTS_FILES, OFFICIAL_FILE, *shards} - names:  # which would be read first
            (folder / stale).unlink(missing_ok=True)


def checked_state(model: DiT) -> dict[str, Tensor]:
    """Return a model's state dict on the CPU, a whole and finite one of a DiT.

    Raises:
        CheckpointError: it is not; the message names what is missing, unexpected, misshapen or not finite.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    checked(state, "official", model.config)
    return state


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Raise what goes wrong as a CheckpointError that begins with the path."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these, depending on who writes
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CheckpointError(f"{path}: cannot be written: {one_line(reason)}") from error


def check_expressible(state: dict[str, Tensor], config: DiTConfig) -> None:
    """Raise CheckpointError unless diffusers' ``DiTTransformer2DModel`` has a place for everything that the model is."""
    height, width = config.grid
    if config.conditioning != "adaln_zero":
        raise CheckpointError(f"conditioning: got {config.conditioning!r}, but diffusers' class has 'adaln_zero' only")
    if height != width:
        raise CheckpointError(f"input_size: got {config.input_size}, but diffusers' class has square grids only")
    if config.mlp_hidden_size != 4 * config.hidden_size:
        raise CheckpointError(f"mlp_ratio: got {config.mlp_ratio}, but diffusers' class has 4 only")
    if not config.has_null_class:
        raise CheckpointError("class_dropout_prob: got 0, but diffusers' class always has a row for no class")
    recomputed = positions_like(state[POSITIONS], config)
    if not same_bits(state[POSITIONS], recomputed):
        difference = largest_difference(state[POSITIONS], recomputed)
        raise CheckpointError(
            f"{POSITIONS}: differs by up to {difference:.3g} from the sine-cosine positions that diffusers recomputes"
        )


def _write_safetensors(path: Path, state: dict[str, Tensor], config: DiTConfig, trained_for: TrainedFor | None) -> None:
    """Write a file with the permissions that the umask leaves, where safetensors gives some to the user alone."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(state, path, metadata=to_metadata(config, trained_for))
    with path.open("r+b") as stream:  # in one order of metadata the same weights are the same bytes
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise CheckpointError(f"cannot be written: its header took {len(text)} bytes, expected at most {size}")
        stream.seek(8)
        stream.write(text.ljust(size))
    path.chmod(mode)


def _write_torch(path: Path, state: dict[str, Tensor], config: DiTConfig, trained_for: TrainedFor | None) -> None:
    # Of a view torch would write the whole storage, as where somebody has put all parameters into one.
    whole = {
        name: value if value.untyped_storage().nbytes() == value.nbytes else value.clone() for name, value in state.items()
    }
    with without_positions(), path.open("wb") as stream:  # not by its name, which would be part of the bytes
        torch.save(to_content(whole, config, trained_for), stream)


def _write_diffusers_folder(path: Path, state: dict[str, Tensor], config: DiTConfig, trained_for: TrainedFor | None) -> None:
    path.mkdir()
    _write_safetensors(path / WEIGHTS_FILE, to_diffusers(state), config, trained_for)
    fields = to_diffusers_config(config, trained_for)
    (path / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


def _write_official_folder(path: Path, state: dict[str, Tensor], config: DiTConfig, trained_for: TrainedFor | None) -> None:
    path.mkdir()
    _write_safetensors(path / OFFICIAL_FILE, state, config, trained_for)
    fields = to_json(config)  # as huggingface_hub's mixin writes it
    (path / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


def _shards(index: Path) -> set[str]:
    """Return the names of weights beside an index that it lists; none if there is no index, or it cannot be read as one."""
    try:
        files = read_json(index).get("weight_map")
    except (CheckpointError, OSError):
        return set()
    listed = files.values() if isinstance(files, dict) else ()
    return {f for f in listed if isinstance(f, str) and Path(f).name == f and f.endswith((".safetensors", ".bin"))}
