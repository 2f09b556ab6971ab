"""Precision settings that every bench runs with, so that no reference gets to round what others do not."""

from __future__ import annotations

import torch


def fix_precision() -> dict[str, str | bool]:
    """Turn off TF32 in matmuls and convolutions, keep torch's default reductions, and return the settings as results show them.

    Split reductions of 16-bit matmuls may be in 16 bits, which is torch's default and what users run.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    return precision()


def precision() -> dict[str, str | bool]:
    """Return the current settings."""
    return {
        "float32 matmul": torch.get_float32_matmul_precision(),
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
        "bf16 reductions in bf16": bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
        "fp16 reductions in fp16": bool(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction),
    }
