"""Between latents and images, by diffusers' AutoencoderKL."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .argument_checks import as_float, as_int, check_same_shape, check_tensor, check_type, describe

VAE: TypeAlias = Any  # diffusers' AutoencoderKL, which is imported only where one is loaded
OFFICIAL = "stabilityai/sd-vae-ft-ema"  # what the paper's models were trained with
_HUB_NAME = r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)?"


class VAEError(ValueError):
    """A VAE that cannot be loaded, or does not fit: which one, and what to do about it, on one line."""


def load_vae(source: str | Path) -> VAE:
    """In eval mode, fp32, on the CPU.

    Args:
        source: a folder with diffusers' config.json and weights, or one of a pipeline, which has it in ``vae/``; or a name
            on Hugging Face's hub, ``owner/name`` or ``owner/name/folder``, which is downloaded once.

    Raises:
        VAEError: diffusers is not installed; there is no such VAE, it cannot be downloaded, or its weights are incomplete.
        TypeError: the source is no path or name.
    """
    check_type("source", source, (str, Path), "a folder, or a name on the hub")
    place, options = _place(str(source))
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise VAEError("vae: needs diffusers: pip install diffusers") from error
    try:
        config = AutoencoderKL.load_config(place, **options)
        if config.get("_class_name") != "AutoencoderKL":
            raise VAEError(f"vae: {source}: got a {config.get('_class_name')}, expected an AutoencoderKL")
        vae, loading = AutoencoderKL.from_pretrained(place, output_loading_info=True, low_cpu_mem_usage=False, **options)
    except VAEError:
        raise
    except Exception as error:  # diffusers and the hub's client raise whatever befits them
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(place).is_dir():
            raise VAEError(f"vae: {source}: cannot be loaded: {line}") from error
        raise VAEError(
            f"vae: {source}: no folder here, and the hub did not give it: {line} "
            f"(without a network: `hf download {place} --local-dir FOLDER` where there is one, then give FOLDER)"
        ) from error
    if loading["missing_keys"]:
        raise VAEError(f"vae: {source}: its weights lack {len(loading['missing_keys'])}, such as {loading['missing_keys'][0]}")
    return vae.float().eval()


@torch.no_grad()  # tensors of inference mode could not be trained on
def decode(vae: VAE, latents: Tensor, slice_size: int = 1) -> Tensor:
    """[N, 3, H, W] fp32 in [-1, 1] on the VAE's device.

    Args:
        vae: what ``load_vae`` returned.
        latents: [N, C, h, w], of unit variance as the diffusion model makes them.
        slice_size: how many are decoded at once, always exactly: memory, and an image's bits, depend on it and on no N.

    Raises:
        VAEError: latents of other channels.
    """
    _check_batch("latents", latents, vae)
    check_channels(vae, latents.shape[1])
    scale, shift = scaling(vae).values()
    latents = latents.to(vae.device, vae.dtype) / scale + shift
    size = as_int("slice_size", slice_size, 1)
    return _in_slices(lambda part: vae.decode(part, return_dict=False)[0].float().clamp(-1, 1), latents, size)


@torch.no_grad()
def encode_moments(vae: VAE, images: Tensor, slice_size: int = 1) -> Tensor:
    """[N, 2C, h, w] fp32 on the VAE's device: mean and standard deviation of the latents, as the encoder has them.

    Args:
        vae: what ``load_vae`` returned.
        images: [N, 3, H, W] in [-1, 1].
        slice_size: how many are encoded at once, always exactly: memory, and the bits, depend on it and on no N.
    """

    def moments(part: Tensor) -> Tensor:
        latents = vae.encode(part, return_dict=False)[0]
        return torch.cat([latents.mean, latents.std], 1).float()

    _check_batch("images", images, vae)
    return _in_slices(moments, images.to(vae.device, vae.dtype), as_int("slice_size", slice_size, 1))


def draw_latents(moments: Tensor, noise: Tensor, scaling_factor: float, shift_factor: float) -> Tensor:
    """[N, C, h, w] fp32, of about unit variance, as a diffusion model is trained on them.

    Args:
        moments: [N, 2C, h, w], of ``encode_moments``.
        noise: [N, C, h, w] fp32, normal: which of the latents that the image may have.
        scaling_factor: of ``scaling``, as is ``shift_factor``.
    """
    check_tensor("moments", moments, "[N, 2C, h, w]")
    if moments.dim() != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments: got shape {tuple(moments.shape)}, expected [N, 2C, h, w]")
    scaling_factor, shift_factor = as_float("scaling_factor", scaling_factor), as_float("shift_factor", shift_factor)
    check_same_shape("noise", noise, moments[:, ::2], "half of moments")
    mean, std = moments.float().chunk(2, 1)  # [N, C, h, w]
    return (mean + std * noise - shift_factor) * scaling_factor  # [N, C, h, w]


def check_channels(vae: VAE, channels: int) -> None:
    _check_vae(vae)
    channels, expected = as_int("channels", channels), vae.config["latent_channels"]
    if channels != expected:
        raise VAEError(f"vae: decodes {expected} channels, but the model makes {channels}")


def scaling(vae: VAE) -> dict[str, float]:
    """What the VAE's latents are divided by, and what is then added."""
    _check_vae(vae)
    return {"scaling_factor": vae.config["scaling_factor"], "shift_factor": vae.config.get("shift_factor") or 0.0}


def with_scaling(vae: VAE, scaling_factor: float, shift_factor: float) -> VAE:
    """Return a VAE of the same weights whose latents have another scale; the VAE itself where they have this one."""
    own, wanted = scaling(vae), {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    if own == wanted:
        return vae
    warnings.warn(f"vae: scales latents by {_said(own)}, but the model was trained on those by {_said(wanted)}", stacklevel=3)
    scaled = copy.copy(vae)
    scaled.register_to_config(**wanted)
    return scaled


def _said(scale: dict[str, float]) -> str:
    factor, shift = scale.values()
    return f"{factor:g}" + (f" after a shift of {-shift:g}" if shift else "")


def image_size(vae: VAE, latent_size: int) -> int:
    """Pixels along a side whose latents are this many."""
    _check_vae(vae)
    return as_int("latent_size", latent_size, 1) * 2 ** (len(vae.config["block_out_channels"]) - 1)


def latent_shape(vae: VAE, pixels: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images.

    Raises:
        VAEError: so many pixels do not make whole latents.
    """
    _check_vae(vae)
    size, rest = divmod(as_int("pixels", pixels), image_size(vae, 1))
    if rest or size < 1:
        raise VAEError(f"vae: encodes multiples of {image_size(vae, 1)} pixels, got {pixels}")
    return vae.config["latent_channels"], size, size


def _check_vae(vae: VAE) -> None:
    if "latent_channels" not in (getattr(vae, "config", None) or ()) or not hasattr(vae, "decode"):
        raise TypeError(f"vae: got {describe(vae)}, expected an AutoencoderKL, such as load_vae returns")


def _check_batch(name: str, batch: Tensor, vae: VAE) -> None:
    _check_vae(vae)
    check_tensor(name, batch, "[N, C, H, W]")
    if batch.dim() != 4 or not batch.is_floating_point():
        raise ValueError(f"{name}: got {batch.dtype} {tuple(batch.shape)}, expected [N, C, H, W] of floats")


def _in_slices(compute: Callable[[Tensor], Tensor], inputs: Tensor, slice_size: int) -> Tensor:
    """What ``compute`` makes of [N, ...]; it is given ``slice_size`` of them each time, zeros after the last."""
    found = []
    for part in inputs.split(slice_size):
        filled = torch.cat([part, part.new_zeros(slice_size - len(part), *part.shape[1:])])
        found.append(compute(filled)[: len(part)])
    return torch.cat(found)


def _place(source: str) -> tuple[str, dict[str, Any]]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "vae"
        return str(inner if inner.is_dir() else folder), {"local_files_only": True}
    if folder.exists() or not re.fullmatch(_HUB_NAME, source):
        raise VAEError(f"vae: {source}: there is no such folder")
    owner, name, *inside = source.split("/")
    return f"{owner}/{name}", {"subfolder": inside[0]} if inside else {}
