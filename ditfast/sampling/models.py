"""Models that a sampler calls: a DiT of ditfast, one inside a wrapper, or any other that maps (x, t, y) to its output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..argument_checks import DTYPES, check_tensor, describe
from ..checkpoints import CheckpointError, CheckpointSource
from ..checkpoints.infer import infer_config
from ..checkpoints.source import training_of
from ..config import DiTConfig
from ..model import DiT
from ..plain import is_silent

WRAPPERS = (AveragedModel, DistributedDataParallel, nn.DataParallel)  # whose forward is the module's own
_DESCRIPTION = "a ditfast.DiTConfig, or an object with in_channels, input_size and num_classes"
_OPTIONAL = ("learn_sigma", "class_dropout_prob", "flavour", "prediction")
_OFFICIAL_CHILDREN = ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")


class Denoiser:
    """A model as the sampling loop calls it, with its config and the place of its weights.

    Args:
        model: a ``ditfast.DiT``, a wrapper of one, an official or diffusers' DiT, or anything that is called as
            ``model(x [B, C, H, W], t [B], y [B])`` and returns [B, C, H, W] or [B, 2C, H, W].
        config: describes the model, as in ``ditfast.sample``; None takes the model's own.

    Attributes:
        source: of a model that ``load_checkpoint`` made; None of others.
        trained_for: what solvers, images and labels depend on: the source's, or what is usual for the config.

    Raises:
        TypeError: the model cannot be called, or nothing describes it; the message names the argument.
        ValueError: a field of the description, or weights that no sampler can use.
    """

    def __init__(self, model: Any, config: Any = None):
        if not callable(model) or isinstance(model, type):
            raise TypeError(f"model: got {describe(model)}, expected a ditfast.DiT, or a module called as model(x, t, y)")
        self.model = _unwrap(model)
        self.config = _own_config(self.model) if config is None else _as_config(config)
        self.source = _source(self.model)
        self.trained_for = training_of(self.source, self.config)
        self.device, self.dtype = _place(self.model)
        self._is_ours = isinstance(self.model, DiT) and type(self.model).forward is DiT.forward
        inner = getattr(self.model, "_orig_mod", self.model)  # a compiled one is diffusers' too
        parameters = inspect.signature(type(inner).forward).parameters if isinstance(inner, nn.Module) else {}
        self._has_diffusers_arguments = "class_labels" in parameters
        if self.device.type == "meta" or (isinstance(self.model, DiT) and self.dtype not in DTYPES):
            got = f"weights of {self.dtype} on {self.device}"
            raise ValueError(f"model: got {got}, expected float32, float16 or bfloat16 on a device with memory: call model.to")

    @property
    def is_unhooked(self) -> bool:
        """True if a CUDA graph may replay the model: its forward is ditfast's, and no module has a hook."""
        return self._is_ours and all(map(is_silent, self.model.modules()))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return [B, C, H, W] or [B, 2C, H, W] for x of the model's dtype, fp32 times and int64 labels."""
        if self._is_ours:
            return self.model(x, t, y)
        output = self.model(x, timestep=t, class_labels=y) if self._has_diffusers_arguments else self.model(x, t, y)
        output = getattr(output, "sample", output)  # diffusers' models return an object
        batch, channels, *size = x.shape
        single, double = (batch, channels, *size), (batch, 2 * channels, *size)
        check_tensor("model", output, f"{single} or {double} from it")
        if tuple(output.shape) not in (single, double):
            raise ValueError(f"model: got shape {tuple(output.shape)} from it, expected {single} or {double}")
        return output if output.dtype in DTYPES else output.float()


def _unwrap(model: Any) -> Any:
    """Return the module inside averaging and data-parallel wrappers without hooks; other wrappers are called."""
    while type(model) in WRAPPERS and is_silent(model):
        model = model.module
    return model


def _own_config(model: Any) -> DiTConfig:
    for module in model.modules() if isinstance(model, nn.Module) else (model,):
        config: Any = getattr(module, "config", None)
        if isinstance(config, DiTConfig):
            return config
        if hasattr(config, "num_embeds_ada_norm"):
            return DiTConfig(
                patch_size=1,
                in_channels=config.in_channels,
                input_size=config.sample_size,
                num_classes=config.num_embeds_ada_norm,
                learn_sigma=module.out_channels == 2 * config.in_channels,
                flavour="diffusers",
            )
        if all(hasattr(module, name) for name in _OFFICIAL_CHILDREN):
            try:
                return infer_config(module.state_dict(), heads=[1])  # which no sampler reads
            except CheckpointError:
                break
    kind = describe(model) if not isinstance(model, nn.Module) else f"{type(model).__module__}.{type(model).__qualname__}"
    raise TypeError(f"config: got None, expected {_DESCRIPTION}, as the model ({kind}) does not describe itself")


def _source(model: Any) -> CheckpointSource | None:
    """Return where the weights came from, of a model or of the outermost module in it that was loaded; None if none was."""
    modules = model.modules() if isinstance(model, nn.Module) else (model,)
    sources = (getattr(module, "source", None) for module in modules)
    return next((source for source in sources if isinstance(source, CheckpointSource)), None)


def _as_config(config: Any) -> DiTConfig:
    if isinstance(config, DiTConfig):
        return config
    given = {name: getattr(config, name, None) for name in ("in_channels", "input_size", "num_classes")}
    if None in given.values():
        raise TypeError(f"config: got {describe(config)}, expected {_DESCRIPTION}")
    stated = {name: getattr(config, name) for name in _OPTIONAL if hasattr(config, name)}
    defaults = {"patch_size": 1, "learn_sigma": False, "flavour": "diffusers"}  # whose guidance is of all channels
    try:
        return DiTConfig(**{**defaults, **given, **stated})
    except (TypeError, ValueError) as error:
        raise type(error)(f"config: {error}") from error


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the first floating-point weight; the CPU and fp32 for a model without any."""
    weights: Iterator[Tensor] = model.parameters() if hasattr(model, "parameters") else iter(())
    weight = next((weight for weight in weights if weight.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if weight is None else (weight.device, weight.dtype)
