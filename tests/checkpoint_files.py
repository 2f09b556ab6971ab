"""What tests of checkpoints start from: small configs, non-zero weights, files as other programs write them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support import randomize
from torch import Tensor

from ditfast import DiTConfig, reference

SMALL = {"depth": 2, "hidden_size": 48, "num_heads": 4, "input_size": 8, "num_classes": 10}
KNOWN_WIDTH = {"depth": 2, "hidden_size": 384, "num_heads": 6, "input_size": 8, "num_classes": 10}


def small(**fields: object) -> DiTConfig:
    """Of a width whose heads nobody can know."""
    return DiTConfig(**{**SMALL, **fields})  # type: ignore[arg-type]


def known_width(**fields: object) -> DiTConfig:
    return DiTConfig(**{**KNOWN_WIDTH, **fields})  # type: ignore[arg-type]


def weights_of(config: DiTConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """An official state dict, all of it non-zero."""
    torch.manual_seed(seed)
    return randomize(reference.DiT(config)).to(dtype).state_dict()


def oracle_of(config: DiTConfig, state: Mapping[str, Tensor]) -> reference.DiT:
    oracle = reference.DiT(config).eval().to(state["pos_embed"].dtype)
    oracle.load_state_dict(state)
    return oracle


def training_checkpoint(ema: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, object]:
    """As the official training script saves it; its argparse.Namespace is a real one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-4)
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {"model": dict(model), "ema": dict(ema), "opt": optimizer.state_dict(), "args": parser.parse_args([])}


def saved(content: object, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def inputs(config: DiTConfig, dtype: torch.dtype = torch.float32, B: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Late timesteps, where flavours differ most."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, *config.input_shape, generator=generator).to(dtype)
    return x, torch.tensor([999, 500, 1])[:B], torch.randint(config.num_classes, (B,), generator=generator)


def same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name].view(torch.uint8), value.contiguous().view(torch.uint8))
        for name, value in expected.items()
    )
