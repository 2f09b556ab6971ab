"""Memory that commands take, asked for before they work."""

from __future__ import annotations

import argparse
import dataclasses
import math
from contextlib import AbstractContextManager

from ..config import DiTConfig
from ..dtypes import DTYPES, INT8
from ..flops import parameters, training_bytes
from ..flops.memory import FP32, sampling_bytes
from ..free_memory import enough_memory, free_bytes
from ..sampling.ranks import Ranks
from ..training import TrainSettings
from ..vae import VAE, image_size

PIXELS = "latents instead of pixels (--vae, or ditfast extract-latents once)"


def training_memory(
    args: argparse.Namespace, settings: TrainSettings, config: DiTConfig, ranks: Ranks, *, pixels: bool
) -> AbstractContextManager[None]:
    """Return ``enough_memory`` for a run of ``ditfast train`` on each device, model and optimizer among it.

    Args:
        args: of the command.
        settings: the recipe.
        config: of the model.
        ranks: which share the batch.
        pixels: True where the data could be latents instead.
    """
    free = free_bytes(args.device)
    fits = [given for given in _smaller(settings, ranks) if free is None or _training(args, given, config, ranks)[1] <= free]
    advice = ["a smaller --batch"] * (settings.batch > 1) + ["a smaller --model"] * (args.init is None)
    if fits:
        plan = " --checkpoint-activations" if fits[0].checkpoint_activations else ""
        advice.insert(0, f"--accumulate {fits[0].accumulate}{plan}")
    if pixels:
        advice.append(PIXELS)
    least, estimate = _training(args, settings, config, ranks)
    take = f"take {', or '.join(advice or ['a larger device'])}"
    return enough_memory(f"--batch: got {settings.batch}", args.device, take, least=least, estimate=estimate)


def _smaller(settings: TrainSettings, ranks: Ranks) -> list[TrainSettings]:
    """Return the same recipe cut into more parts, then with activation checkpointing too."""
    share = settings.batch // ranks.world
    cuts = [parts for parts in range(settings.accumulate + 1, share + 1) if share % parts == 0 and settings.batch % parts == 0]
    plans = dict.fromkeys((settings.checkpoint_activations, True))
    return [dataclasses.replace(settings, accumulate=cut, checkpoint_activations=plan) for plan in plans for cut in cuts]


def _training(args: argparse.Namespace, settings: TrainSettings, config: DiTConfig, ranks: Ranks) -> tuple[int, int]:
    """Return the bytes of a run on each device: at least, and as the memory table has it."""
    share = max(1, settings.batch // ranks.world)
    plan = "checkpoint" if settings.checkpoint_activations or settings.compile else "keep"  # a compiler may keep as little
    sizes = training_bytes(
        config,
        max(1, share // settings.accumulate),
        DTYPES[settings.dtype],
        plan,
        shards=ranks.world if args.parallel == "fsdp" else 1,
        averages=len(settings.ema),
    )
    latents = FP32 * math.prod(config.input_shape) * (settings.batch + share)  # noise of all ranks' rows, latents of these
    return latents + sizes.least_peak(accumulates=settings.accumulate > 1), latents + sizes.total


def sampling_memory(args: argparse.Namespace, config: DiTConfig, vae: VAE | None, num: int) -> AbstractContextManager[None]:
    """Return ``enough_memory`` for the batches of ``ditfast sample``, of ``num`` images in all and a model on the CPU."""
    dtype = DTYPES["fp32" if args.dtype == INT8 else args.dtype]
    together = min(args.batch, num)
    rows = together * (1 if args.cfg == 1 else 2)
    latents = FP32 * together * math.prod(config.input_shape)
    least = latents + sampling_bytes(config, rows, dtype, args.device.type)
    if vae is not None:
        scale = image_size(vae, 1)
        least = max(least, FP32 * together * 3 * math.prod(config.input_shape[1:]) * scale**2)
    if args.device.type != "cpu":
        least += dtype.itemsize * parameters(config)
    advice = "take a smaller one" if together > 1 else "take a larger device"
    return enough_memory(f"--batch: got {args.batch}", args.device, advice, least=least)


def encoding_memory(args: argparse.Namespace, vae: VAE) -> AbstractContextManager[None]:
    """Return ``enough_memory`` for the batches of ``ditfast extract-latents``."""
    channels = 2 * vae.config["block_out_channels"][0]  # a residual block's input and output at the image's size
    least = args.batch * FP32 * channels * args.image_size**2
    return enough_memory(f"--batch: got {args.batch}", args.device, "take a smaller one", least=least)
