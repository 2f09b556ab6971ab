"""Activation checkpointing of blocks: what is cheap is computed again, products are kept.

A block of DiT-XL/2 spends nearly all its time in products (linears, attention) and half its memory on what lies between them
(norms, modulation, GELU, gated residuals). Keeping the products' outputs only costs a few percent of a step's time, where
checkpointing whole blocks costs a third (Chen et al. 2016 recompute everything; Korthikanti et al. 2022 choose).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .dispatch.override import checkpoint_contexts

Context: TypeAlias = contextlib.AbstractContextManager[Any]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "linear_in_fp32", "linear_gelu", "linear_gated_residual", "mlp")
ATTENTION = "attention"  # a part of every such op's name: torch's, flash-attn's, ours


def checkpointed(block: Callable[..., Any], draws: bool) -> Callable[..., Any]:
    """Return the block as a function that keeps the outputs of its products alone for the backward.

    The recomputation of a block that draws random numbers begins with the random state of the forward.
    """
    return partial(checkpoint, block, use_reentrant=False, context_fn=selective_contexts, preserve_rng_state=draws)


def selective_contexts() -> tuple[Context, Context]:
    """``context_fn`` for ``torch.utils.checkpoint``; the recomputation makes the forward's choices of backends."""
    keep, reuse = create_selective_checkpoint_contexts(_policy)
    forward, again = checkpoint_contexts()
    return _both(keep, forward), _both(reuse, again)


def _policy(context: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition("::")[2].partition(".")[0]
    kept = name in PRODUCTS or ATTENTION in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _both(outer: Context, inner: Context) -> Iterator[None]:
    with outer, inner:
        yield
