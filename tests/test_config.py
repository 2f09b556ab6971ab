import dataclasses
import json
import math

import pytest
from support import raises_naming

from ditfast import DiTConfig
from ditfast.config import CONDITIONINGS, FLAVOURS, MODEL_NAMES, Flavour


def test_the_twelve_models() -> None:
    assert len(MODEL_NAMES) == 12
    widths = {name: (c.depth, c.hidden_size, c.num_heads) for name in MODEL_NAMES for c in [DiTConfig.from_name(name)]}
    assert widths["DiT-S/8"] == (12, 384, 6)
    assert widths["DiT-B/4"] == (12, 768, 12)
    assert widths["DiT-L/2"] == (24, 1024, 16)
    assert widths["DiT-XL/2"] == (28, 1152, 16)
    assert {DiTConfig.from_name(name).num_tokens for name in MODEL_NAMES} == {256, 64, 16}


def test_sizes() -> None:
    assert DiTConfig.from_name("DiT-XL/2", image_size=512).num_tokens == 1024
    assert DiTConfig.from_name("DiT-XL/2", image_size=512).input_size == 64
    assert DiTConfig.from_name("DiT-S/4", image_size=(256, 512)).grid == (8, 16)
    assert DiTConfig.from_name("DiT-S/4", input_size=28, in_channels=1).input_shape == (1, 28, 28)
    assert DiTConfig(input_size=(16, 16)) == DiTConfig(input_size=16)
    assert DiTConfig(input_size=[16, 8]).input_size == (16, 8)  # as JSON brings it


def test_is_a_frozen_dataclass() -> None:
    config = DiTConfig.from_name("DiT-B/2", conditioning="adaln", num_classes=10)
    assert dataclasses.replace(config, num_classes=3).null_class == 3
    assert DiTConfig(**dataclasses.asdict(config)) == config
    assert len({config, dataclasses.replace(config)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3  # type: ignore[misc]


def test_label_rows() -> None:
    assert DiTConfig(num_classes=10).label_rows == 11
    assert DiTConfig(num_classes=10, class_dropout_prob=0.0).label_rows == 10


def test_guidance_channels() -> None:
    assert DiTConfig().guidance_channels == 3
    assert DiTConfig(in_channels=1).guidance_channels == 1
    assert DiTConfig(flavour="diffusers").guidance_channels == 4


def test_a_flavour_of_ones_own() -> None:
    own = Flavour(127, 1e-6, 2)
    config = DiTConfig(flavour=own)
    assert (config.flavour, config.arithmetic, config.guidance_channels) == (own, own, 2)
    assert DiTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert isinstance(DiTConfig(flavour=[127, 1e-6, 2]).flavour, Flavour)  # type: ignore[arg-type]
    assert len({config, DiTConfig(flavour=own)}) == 1


@pytest.mark.parametrize("name", FLAVOURS)
def test_a_known_flavour_goes_by_its_name(name: str) -> None:
    assert DiTConfig(flavour=FLAVOURS[name]) == DiTConfig(flavour=name)
    assert DiTConfig(flavour=FLAVOURS[name]).flavour == name


@pytest.mark.parametrize(
    ("field", "flavour", "expected"),
    [
        ("flavour", (128, 1e-6), "official, diffusers, or a Flavour"),
        ("flavour", None, "official, diffusers, or a Flavour"),
        ("flavour.timestep_frequency_divisor", (0, 1e-6, 3), "positive integer"),
        ("flavour.timestep_frequency_divisor", (128.0, 1e-6, 3), "positive integer"),
        ("flavour.mlp_norm_eps", (128, 0.0, 3), "positive number"),
        ("flavour.mlp_norm_eps", (128, math.inf, 3), "finite number"),
        ("flavour.guidance_channels", (128, 1e-6, 0), "positive integer"),
    ],
)
def test_flavour_errors(field: str, flavour: object, expected: str) -> None:
    assert expected in raises_naming(field, lambda: DiTConfig(flavour=flavour))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("depth", 0, "positive integer"),
        ("depth", True, "positive integer"),
        ("hidden_size", 100, "multiple of num_heads=16"),
        ("hidden_size", "384", "positive integer"),
        ("num_heads", -1, "positive integer"),
        ("patch_size", 2.0, "positive integer"),
        ("input_size", 33, "multiples of patch_size=2"),
        ("input_size", (32, 31), "multiples of patch_size=2"),
        ("input_size", (32, 32, 32), "(height, width) pair"),
        ("in_channels", 0, "positive integer"),
        ("num_classes", 0, "positive integer"),
        ("learn_sigma", 1, "True or False"),
        ("mlp_ratio", "4", "a finite number"),
        ("mlp_ratio", math.nan, "a finite number"),
        ("mlp_ratio", 0.0, "at least 1/hidden_size"),
        ("class_dropout_prob", 1.0, "0 <= p < 1"),
        ("conditioning", "adaLN-Zero", ", ".join(CONDITIONINGS)),
        ("flavour", "timm", "official, diffusers"),
    ],
)
def test_errors_name_the_field(field: str, value: object, expected: str) -> None:
    assert expected in raises_naming(field, lambda: DiTConfig(**{field: value}))  # type: ignore[arg-type]


def test_position_width() -> None:
    assert "multiple of 4" in raises_naming("hidden_size", lambda: DiTConfig(hidden_size=6, num_heads=1))


def test_a_named_model_with_other_fields() -> None:
    config = DiTConfig.from_name("DiT-B/4", depth=2, patch_size=8, mlp_ratio=2.0)
    assert config == DiTConfig(depth=2, hidden_size=768, num_heads=12, patch_size=8, input_size=32, mlp_ratio=2.0)


def test_from_name_errors() -> None:
    assert "DiT-XL/2" in raises_naming("name", lambda: DiTConfig.from_name("XL/2"))
    assert "multiples of 8" in raises_naming("image_size", lambda: DiTConfig.from_name("DiT-S/2", image_size=250))
    with pytest.raises(ValueError, match="not both"):
        DiTConfig.from_name("DiT-S/2", image_size=256, input_size=32)
