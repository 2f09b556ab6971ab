"""From latents to images, by the decoder of diffusers' AutoencoderKL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

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
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise VAEError("vae: needs diffusers: pip install diffusers") from error
    place, options = _place(str(source))
    try:
        config = AutoencoderKL.load_config(place, **options)
        if config.get("_class_name") != "AutoencoderKL":
            raise VAEError(f"vae: {source}: got a {config.get('_class_name')}, expected an AutoencoderKL")
        vae, loading = AutoencoderKL.from_pretrained(place, output_loading_info=True, low_cpu_mem_usage=False, **options)
    except VAEError:
        raise
    except Exception as error:  # diffusers and the hub's client raise whatever befits them
        raise VAEError(f"vae: {source}: {_why(error, place)}") from error
    if loading["missing_keys"]:
        raise VAEError(f"vae: {source}: its weights lack {len(loading['missing_keys'])}, such as {loading['missing_keys'][0]}")
    return vae.float().eval()


@torch.inference_mode()
def decode(vae: VAE, latents: Tensor, slice_size: int = 1) -> Tensor:
    """[N, 3, H, W] fp32 in [-1, 1] on the VAE's device.

    Args:
        vae: what ``load_vae`` returned.
        latents: [N, C, h, w], of unit variance as the diffusion model makes them.
        slice_size: how many are decoded at once, always exactly: memory, and an image's bits, depend on it and on no N.

    Raises:
        VAEError: latents of other channels.
    """
    check_channels(vae, latents.shape[1])
    scale, shift = scaling(vae).values()
    latents = latents.to(vae.device, vae.dtype) / scale + shift
    images = []
    for part in latents.split(slice_size):
        filled = torch.cat([part, part.new_zeros(slice_size - len(part), *part.shape[1:])])
        images.append(vae.decode(filled, return_dict=False)[0][: len(part)].float().clamp(-1, 1))
    return torch.cat(images)


def check_channels(vae: VAE, channels: int) -> None:
    expected = vae.config["latent_channels"]
    if channels != expected:
        raise VAEError(f"vae: decodes {expected} channels, but the model makes {channels}")


def scaling(vae: VAE) -> dict[str, float]:
    """What the VAE's latents are divided by, and what is then added."""
    return {"scaling_factor": vae.config["scaling_factor"], "shift_factor": vae.config.get("shift_factor") or 0.0}


def image_size(vae: VAE, latent_size: int) -> int:
    """Pixels along a side whose latents are this many."""
    return latent_size * 2 ** (len(vae.config["block_out_channels"]) - 1)


def _place(source: str) -> tuple[str, dict[str, Any]]:
    """What diffusers is to load, and with which options."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "vae"
        return str(inner if inner.is_dir() else folder), {"local_files_only": True}
    if folder.exists() or not re.fullmatch(_HUB_NAME, source):
        raise VAEError(f"vae: {source}: there is no such folder")
    owner, name, *inside = source.split("/")
    return f"{owner}/{name}", {"subfolder": inside[0]} if inside else {}


def _why(error: Exception, place: str) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if Path(place).is_dir():
        return f"cannot be loaded: {line}"
    return (
        f"no folder here, and the hub did not give it: {line} "
        f"(without a network: `hf download {place} --local-dir FOLDER` where there is one, then give FOLDER)"
    )
