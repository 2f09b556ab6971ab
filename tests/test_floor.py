"""The computed time: what it has to come to where only products count, or only bytes; and figures made without this code."""

from __future__ import annotations

import math

import pytest
import torch

from ditfast import DiTConfig, flops
from ditfast.config import CONDITIONINGS
from ditfast.flops import DEVICES, DeviceSpec, floor_ms, operations

# Model, pixels, batch, device; eager and fused ms, from another count of the paper's shapes.
ROOFLINES = [
    ("DiT-XL/2", 256, 32, "H100", 13.267, 9.437),
    ("DiT-XL/2", 256, 1, "H100", 0.660, 0.541),
    ("DiT-XL/2", 512, 8, "H100", 13.724, 9.898),
    ("DiT-XL/8", 256, 8, "H100", 0.534, 0.473),
    ("DiT-L/2", 256, 128, "H200", 32.314, 24.153),
    ("DiT-B/4", 256, 32, "H200", 0.662, 0.468),
    ("DiT-S/2", 256, 32, "H100", 1.212, 0.658),
]
PEAKLESS = DeviceSpec("", fp32=math.inf, half=math.inf, bandwidth=math.inf, memory=0, arch="", multiprocessors=1)
ENDLESS_BANDWIDTH = PEAKLESS._replace(fp32=1e12, half=1e12)
ENDLESS_PRODUCTS = PEAKLESS._replace(bandwidth=1e9)
BF16 = torch.bfloat16
BATCH = 4


@pytest.mark.parametrize(("name", "pixels", "batch", "device", "eager", "fused"), ROOFLINES)
def test_known_rooflines(name: str, pixels: int, batch: int, device: str, eager: float, fused: float) -> None:
    config = DiTConfig.from_name(name, image_size=pixels)
    assert floor_ms(config, batch, BF16, DEVICES[device]) == pytest.approx(fused, rel=0.01)
    assert floor_ms(config, batch, BF16, DEVICES[device], fused=False) == pytest.approx(eager, rel=0.01)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
def test_products_of_a_forward(conditioning: str, fused: bool) -> None:
    config = DiTConfig.from_name("DiT-B/2", conditioning=conditioning)
    assert floor_ms(config, BATCH, BF16, ENDLESS_BANDWIDTH, fused=fused) == pytest.approx(BATCH * flops.flops(config) * 1e-9)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_products_of_a_step(conditioning: str) -> None:
    """Three times a forward's, but that scores are computed again, and that latents and times need no gradient."""
    config = DiTConfig.from_name("DiT-B/2", conditioning=conditioning)
    T, D, depth = config.num_tokens, config.hidden_size, config.depth
    tokens = T + 2 if conditioning == "in_context" else T
    keys = tokens + 2 if conditioning == "cross_attention" else tokens
    scores = depth * tokens * keys * D
    patches = T * D * config.in_channels * config.patch_size**2
    macs = 3 * flops.macs(config) + scores - patches - 256 * D
    for plan in ("keep", "checkpoint"):
        assert floor_ms(config, BATCH, BF16, ENDLESS_BANDWIDTH, plan) == pytest.approx(2 * BATCH * macs * 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_bytes_of_the_weights_in_a_step(dtype: torch.dtype) -> None:
    """What a step moves for no image: products' weights, AdamW, averages, and autocast's casts."""
    config = DiTConfig.from_name("DiT-XL/2")
    count = flops.parameters(config, positions=False)
    multiplied = sum(weight * times for weight, times in zip(flops.counts.multiplied_weights(config), (28, 1), strict=True))
    products = 3 * multiplied - config.hidden_size * (config.in_channels * config.patch_size**2 + 256)
    casts = 0 if dtype == torch.float32 else 2 * (2 + 4) * multiplied
    expected = products * dtype.itemsize + casts + 4 * count * (1 + 7 + 3 * 2)
    one, two = (floor_ms(config, batch, dtype, ENDLESS_PRODUCTS, "keep", averages=2) for batch in (1, 2))
    assert (2 * one - two) * 1e6 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_what_costs_time(conditioning: str) -> None:
    config, device = DiTConfig.from_name("DiT-B/2", conditioning=conditioning), DEVICES["H100"]
    forward, step = (floor_ms(config, BATCH, BF16, device, plan) for plan in ("none", "keep"))
    assert 3 * forward < step < floor_ms(config, BATCH, BF16, device, "checkpoint")
    for plan in flops.PLANS:
        assert floor_ms(config, BATCH, BF16, device, plan) < floor_ms(config, BATCH, BF16, device, plan, fused=False)
    assert floor_ms(config, BATCH, BF16, device) < floor_ms(config, BATCH, torch.float32, device)


def test_an_unknown_plan() -> None:
    with pytest.raises(ValueError, match="plan: got 'fused', expected one of none, keep, checkpoint"):
        operations(DiTConfig(), 1, BF16, "fused")
