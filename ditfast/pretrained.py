"""Loading, saving and settings of a model under the names that users of diffusers and transformers know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .argument_checks import check_type, describe
from .config import DiTConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from .checkpoints.source import CheckpointSource

_HARMLESS = {"push_to_hub": False, "safe_serialization": True}  # what save_pretrained does anyway


class PretrainedMixin(nn.Module):
    """Base of ``ditfast.DiT``: made by name, from and to folders, as a diffusers model; where it is; gradient checkpointing."""

    config: DiTConfig
    pos_embed: nn.Parameter
    source: CheckpointSource | None = None  # of a model that ``load_checkpoint`` made
    checkpoint_activations = False  # of blocks, in a forward whose gradients are wanted: less memory, a little more time
    _accelerate: ClassVar[Callable[[Any], Any]]  # set by ``ditfast.accelerate``, a module above the models

    @classmethod
    def from_name(cls, name: str, *, image_size: int | tuple[int, int] | None = None, **overrides: Any) -> Self:
        """Return a new model by its name in the paper: ``DiT.from_name("DiT-XL/2", image_size=512)``.

        Args:
            name: one of ``ditfast.config.MODEL_NAMES``.
            image_size: pixels; 256 unless ``input_size`` is given.
            overrides: other fields of ``DiTConfig``.
        """
        return cls(DiTConfig.from_name(name, image_size=image_size, **overrides))

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Return a model of this class from a checkpoint: ``load_checkpoint``, also of an id of the Hugging Face Hub.

        Args:
            path_or_hub_id: a file or folder of any layout; else an id such as ``facebook/DiT-XL-2-256``, whose files
                huggingface_hub fetches.
            subfolder: of the folder or repository; a pipeline's ``transformer`` is found without.
            revision: a branch, tag or commit of the Hub's repository; None for its main branch. Refused for a local path.
            cache_dir: huggingface_hub's folder of fetched files; not used for a local path, and nor are the next three.
            token: of the Hub.
            force_download: fetch again what is there.
            local_files_only: fetch nothing.
            kwargs: of ``load_checkpoint``; ``torch_dtype`` is diffusers' name of ``dtype``.

        Returns:
            The model in eval mode. A subclass is called with the config; parameters that it adds stay as its ``__init__``
            left them, which a warning says.

        Raises:
            CheckpointError: it cannot be fetched or loaded.
            TypeError: ``dtype`` and ``torch_dtype`` are both given.
            ValueError: a ``revision`` of a local path.
        """
        from .checkpoints import load_checkpoint
        from .checkpoints.hub import fetch, is_hub_id
        from .checkpoints.load import as_subclass

        check_type("path_or_hub_id", path_or_hub_id, (str, os.PathLike), "a path or an id of the Hugging Face Hub")
        if "torch_dtype" in kwargs:
            if "dtype" in kwargs:
                raise TypeError(
                    f"torch_dtype: got {kwargs['torch_dtype']} beside dtype={kwargs['dtype']}, expected one of them"
                )
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        path = name = os.fspath(path_or_hub_id)
        if is_hub_id(name):
            options = {"revision": revision, "cache_dir": cache_dir, "token": token, "force_download": force_download}
            path = str(fetch(name, kwargs.get("variant"), subfolder, local_files_only=local_files_only, **options))
        elif revision is not None:
            raise ValueError(f"revision: got {describe(revision)}, expected None, as {name} is a local path")
        elif subfolder is not None:
            path = str(Path(name, subfolder))
        return as_subclass(load_checkpoint(path, **kwargs), cls)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, is_main_process: bool = True, save_function: object = None, **kwargs: Any
    ) -> str | None:
        """Write a folder that ``from_pretrained`` reads, in diffusers' layout where diffusers can hold the model.

        Under ``class Model(ditfast.DiT, huggingface_hub.PyTorchModelHubMixin)`` that mixin also writes its model card, and
        uploads with ``push_to_hub=True`` or ``model.push_to_hub(...)``.

        Args:
            folder: made with its parents; in one that exists the model's files are replaced.
            is_main_process: False writes nothing: for all ranks but one.
            save_function: ignored, as by diffusers; safetensors writes the file.
            kwargs: the mixin's.

        Returns:
            What the mixin returns: the commit's address after an upload; else None.

        Raises:
            CheckpointError: the weights are not a DiT's own, or not finite; or the folder cannot be written.
            TypeError: an argument that needs the mixin.
        """
        if not is_main_process:
            return None
        hub_mixin = getattr(super(), "save_pretrained", None)
        if hub_mixin is not None:
            return hub_mixin(folder, **kwargs)
        for name, value in kwargs.items():
            if _HARMLESS.get(name) is not value:
                raise TypeError(
                    f"{name}: got {describe(value)}, expected no such argument: one safetensors file is written; for uploads "
                    "take class Model(ditfast.DiT, huggingface_hub.PyTorchModelHubMixin)"
                )
        self._save_pretrained(Path(folder))
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the files; called by huggingface_hub's mixin too."""
        from .checkpoints.save import save_folder

        save_folder(self, save_directory)  # type: ignore[arg-type]  # a DiT

    def to_diffusers(self) -> Any:
        """Return an accelerated ``diffusers.DiTTransformer2DModel`` that holds a copy of the weights, for ``DiTPipeline``.

        It has the model's dtype, device and mode, and computes as diffusers does: a warning says where that is otherwise.

        Raises:
            CheckpointError: diffusers' class cannot hold the model (other conditioning designs, grids that are not square, an
                ``mlp_ratio`` other than 4, no row for no class, positions of its own).
            ImportError: diffusers is not installed.
        """
        from .checkpoints.diffusers_model import diffusers_model

        return type(self)._accelerate(diffusers_model(self))  # type: ignore[arg-type]  # a DiT

    @property
    def device(self) -> torch.device:
        """The device that inputs belong on: that of the positions, also where other weights are elsewhere (offloaded)."""
        return self.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs have: that of the positions, also where other weights have another."""
        return self.pos_embed.dtype

    @property
    def is_gradient_checkpointing(self) -> bool:
        """True if a forward keeps little of each block, and the backward computes the rest again."""
        return self.checkpoint_activations

    def enable_gradient_checkpointing(self) -> None:
        """Have forwards with gradients keep less, as ``checkpoint_activations = True`` does (diffusers' name)."""
        self.checkpoint_activations = True

    def disable_gradient_checkpointing(self) -> None:
        """Have forwards keep all that the backward reads."""
        self.checkpoint_activations = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Call ``enable_gradient_checkpointing`` (transformers' name); settings of torch's checkpointing do not apply."""
        self.enable_gradient_checkpointing()

    def gradient_checkpointing_disable(self) -> None:
        """Call ``disable_gradient_checkpointing`` (transformers' name)."""
        self.disable_gradient_checkpointing()

    def __repr__(self) -> str:
        name, modules = super().__repr__().split("(", 1)
        return f"{name}({self.config!r}{modules}"
