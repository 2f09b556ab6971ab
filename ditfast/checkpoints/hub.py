"""A model's files from the Hugging Face Hub, by its id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import CheckpointError, one_line
from .files import CONFIG_FILE, OFFICIAL_FILE, SCHEDULER_FILE, TRANSFORMER, WEIGHTS_FILES, find_weights, with_variant

INSTALL = "pip install huggingface_hub"
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_NAME = re.compile(r".*\.(safetensors|pt|pth|bin|ckpt)")


def is_hub_id(name: str) -> bool:
    """True for ``owner/name`` where nothing of that name is on the disk."""
    return bool(_ID.fullmatch(name)) and not _FILE_NAME.fullmatch(name) and not Path(name).exists()


def fetch(hub_id: str, variant: str | None, subfolder: str | None, **options: Any) -> Path:
    """Return the folder of a model's config, weights and scheduler, from the cache or fetched; safetensors if there are any.

    Args:
        hub_id: such as ``facebook/DiT-XL-2-256``; a pipeline's, whose transformer alone is fetched, or a model's own.
        variant: of the weights' files.
        subfolder: the model's in the repository.
        options: of ``huggingface_hub.snapshot_download``.

    Raises:
        CheckpointError: huggingface_hub is not installed, or cannot fetch it; the message says what to do.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{hub_id}: there is no such file or folder; to fetch it from the Hugging Face Hub: {INSTALL}"
        ) from error
    places = [f"{subfolder}/"] if subfolder else ["", f"{TRANSFORMER}/"]
    try:
        for ending in ("safetensors", "bin"):
            names = [CONFIG_FILE, *_files(ending, variant)]
            patterns = [f"scheduler/{SCHEDULER_FILE}", *(place + name for place in places for name in names)]
            root = huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, **options)
            folder = Path(root, subfolder or "")
            if find_weights(folder, variant) is not None:
                break
    except (OSError, ValueError) as error:  # no network, no such id, no permission, and nothing in the cache
        reason = one_line(str(error))
        raise CheckpointError(
            f"{hub_id}: there is no such file or folder, and it cannot be fetched from the Hugging Face Hub: {reason}"
        ) from error
    return folder


def _files(ending: str, variant: str | None) -> list[str]:
    """Return names, and patterns of shards' names, of both orders of number and variant that diffusers has written."""
    whole = [with_variant(name, variant) for name in WEIGHTS_FILES if f".{ending}" in name]
    numbers = "?????-of-?????"
    first = f"diffusion_pytorch_model{'' if variant is None else f'.{variant}'}-{numbers}.{ending}"
    second = with_variant(f"diffusion_pytorch_model-{numbers}.{ending}", variant)
    official = [OFFICIAL_FILE] if ending == "safetensors" and variant is None else []
    return list(dict.fromkeys([*whole, first, second, *official]))
