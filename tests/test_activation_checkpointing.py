"""Activation checkpointing: what a recomputed block draws again, and what is not kept for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import randomize
from torch import Tensor

from ditfast import DiT, DiTConfig
from ditfast.config import CONDITIONINGS

SMALL = DiTConfig(depth=2, hidden_size=64, num_heads=2, patch_size=2, input_size=8, num_classes=5)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, *SMALL.input_shape), torch.rand(2) * 999, torch.randint(SMALL.label_rows, (2,))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_checkpointing_saves_no_random_state_that_no_block_needs(conditioning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiT(dataclasses.replace(SMALL, conditioning=conditioning))
    model.checkpoint_activations = True
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("saved"))
    model(*inputs()).sum().backward()


def test_checkpointing_draws_a_linear_s_dropout_again() -> None:
    def gradient(checkpoint_activations: bool) -> Tensor:
        torch.manual_seed(0)
        model = randomize(DiT(SMALL))
        model.checkpoint_activations = checkpoint_activations
        model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: torch.nn.functional.dropout(out, 0.5))
        model(*inputs()).square().sum().backward()
        return model.blocks[0].attn.qkv.weight.grad

    assert torch.equal(gradient(False), gradient(True))
