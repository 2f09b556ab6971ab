import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ditfast import DiTConfig, flops, reference
from ditfast.config import CONDITIONINGS, MODEL_NAMES

# Peebles & Xie 2022, tables 1 and 4 and figure 9: Gflops, which are multiply-adds.
PAPER = {
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06,
    "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71,
    "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64,
}  # fmt: skip
PAPER_DESIGNS = {
    "in_context": (119.37, 449.0),
    "cross_attention": (137.62, 597.8),
    "adaln": (118.56, 600.45),
    "adaln_zero": (118.64, 674.83),
}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_papers_models(name: str) -> None:
    assert flops.macs(DiTConfig.from_name(name)) / 1e9 == pytest.approx(PAPER[name], abs=0.02)


def test_xl2_at_512px() -> None:
    assert flops.macs(DiTConfig.from_name("DiT-XL/2", image_size=512)) / 1e9 == pytest.approx(524.60, abs=0.1)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_papers_designs(conditioning: str) -> None:
    config = DiTConfig.from_name("DiT-XL/2", conditioning=conditioning)
    gmacs, millions = PAPER_DESIGNS[conditioning]
    assert flops.macs(config) / 1e9 == pytest.approx(gmacs, abs=0.02)
    assert flops.parameters(config, positions=False) / 1e6 == pytest.approx(millions, abs=0.05)


def test_xl2_parameters() -> None:
    assert flops.parameters(DiTConfig.from_name("DiT-XL/2")) == 675_129_632


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 3),
    width=st.integers(1, 8).map(lambda k: 16 * k),
    patch_size=st.sampled_from([1, 2, 3]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    in_channels=st.integers(1, 5),
    num_classes=st.integers(1, 9),
    learn_sigma=st.booleans(),
    mlp_ratio=st.sampled_from([0.5, 2.5, 4]),
    class_dropout_prob=st.sampled_from([0.0, 0.1]),
    conditioning=st.sampled_from(CONDITIONINGS),
)
def test_agrees_with_the_reference(
    depth: int, width: int, patch_size: int, grid: tuple[int, int], conditioning: str, **fields: object
) -> None:
    """Parameters by counting them, operations by torch's own counter on the meta device."""
    size = (patch_size * grid[0], patch_size * grid[1])
    config = DiTConfig(depth, width, 4, patch_size, size, conditioning=conditioning, **fields)  # type: ignore[arg-type]
    check_against_the_reference(config)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_xl2_agrees_with_the_reference(conditioning: str) -> None:
    check_against_the_reference(DiTConfig.from_name("DiT-XL/2", conditioning=conditioning))


def check_against_the_reference(config: DiTConfig) -> None:
    with torch.device("meta"):
        model = reference.DiT(config).eval()
        x, t, y = torch.empty(1, *config.input_shape), torch.empty(1), torch.empty(1, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x, t, y)
    assert counter.get_total_flops() == flops.flops(config) == 2 * flops.macs(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == flops.parameters(config)
