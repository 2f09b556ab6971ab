"""From a fast model to a file or folder, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..argument_checks import check_choice, check_type
from ..config import DiTConfig
from ..files import whole_file
from ..model import DiT
from .check import POSITIONS, checked
from .configs import to_diffusers_config, to_metadata
from .errors import CheckpointError, one_line
from .files import CONFIG_FILE, WEIGHTS_FILE
from .layouts import LAYOUTS, largest_difference, positions_like, same_bits, to_diffusers


def save_checkpoint(model: DiT, path: str | os.PathLike[str], *, layout: str = "official") -> None:
    """Writes a model's weights as official code or as diffusers reads them.

    A ``.safetensors`` file and a diffusers folder hold the config too, flavour included, and load back exactly; a ``.pt``
    file holds tensors only. Nothing is written unless all of it is: what was at ``path`` stays until then.

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
    try:
        write = _file_writer(path) if layout == "official" else _write_folder
        _check_place(path, layout)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        checked(state, "official", model.config)
        if layout == "diffusers":
            _check_expressible(state, model.config)
        with whole_file(path) as temporary:
            write(temporary, state, model.config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these, depending on who writes
        raise CheckpointError(f"{path}: cannot be written: {one_line(str(error))}") from error


def _file_writer(path: Path) -> Callable[[Path, dict[str, Tensor], DiTConfig], None]:
    writers = {".safetensors": _write_safetensors, ".pt": _write_torch, ".pth": _write_torch}
    if path.suffix not in writers:
        raise CheckpointError(f"expected a name that ends in {', '.join(writers)} for the official layout")
    return writers[path.suffix]


def _check_place(path: Path, layout: str) -> None:
    if not path.parent.is_dir():
        raise CheckpointError(f"the folder {path.parent} does not exist")
    if layout == "official" and path.is_dir():
        raise CheckpointError("is a folder, expected a file")
    if layout == "diffusers" and os.path.lexists(path):
        raise CheckpointError("exists already, expected the name of a new folder")


def _check_expressible(state: dict[str, Tensor], config: DiTConfig) -> None:
    """Whether diffusers' ``DiTTransformer2DModel`` has a place for everything that the model is."""
    height, width = config.grid
    if config.conditioning != "adaln_zero":
        raise CheckpointError(f"conditioning: got {config.conditioning!r}, but diffusers' class has 'adaln_zero' only")
    if height != width:
        raise CheckpointError(f"input_size: got {config.input_size}, but diffusers' class has square grids only")
    if config.mlp_hidden_size != 4 * config.hidden_size:
        raise CheckpointError(f"mlp_ratio: got {config.mlp_ratio}, but diffusers' class has 4 only")
    if not config.class_dropout_prob:
        raise CheckpointError("class_dropout_prob: got 0, but diffusers' class always has a row for no class")
    recomputed = positions_like(state[POSITIONS], config)
    if not same_bits(state[POSITIONS], recomputed):
        difference = largest_difference(state[POSITIONS], recomputed)
        raise CheckpointError(
            f"{POSITIONS}: differs by up to {difference:.3g} from the sine-cosine positions that diffusers recomputes"
        )


def _write_safetensors(path: Path, state: dict[str, Tensor], config: DiTConfig) -> None:
    _save_safetensors(state, path, to_metadata(config))


def _save_safetensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file with the permissions that the umask leaves, where safetensors gives some to the user alone."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(state, path, metadata=metadata)
    path.chmod(mode)


def _write_torch(path: Path, state: dict[str, Tensor], config: DiTConfig) -> None:
    # Views of packed storage would drag all of it along wherever one of them is saved again.
    cloned = {name: value.clone() for name, value in state.items()}
    with path.open("wb") as stream:  # not by its name, which would be part of the bytes
        torch.save(cloned, stream)


def _write_folder(path: Path, state: dict[str, Tensor], config: DiTConfig) -> None:
    path.mkdir()
    _save_safetensors(to_diffusers(state), path / WEIGHTS_FILE, {"format": "pt"})
    (path / CONFIG_FILE).write_text(json.dumps(to_diffusers_config(config), indent=2) + "\n", "utf-8")
