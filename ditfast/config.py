"""What a DiT is: one frozen dataclass, and the twelve models of the paper by name.

Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", table 1 and section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from .argument_checks import wrong_type

PREDICTIONS = ("epsilon", "x0", "v")  # of a Gaussian diffusion
VELOCITY = "velocity"  # of flow matching
CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero")
TIMESTEP_FEATURES = 256
FIRST_NORM_EPS = 1e-6


class Flavour(NamedTuple):
    """Where two public implementations compute different outputs from the same weights."""

    timestep_frequency_divisor: int
    mlp_norm_eps: float
    guidance_channels: int | None  # None: all


# diffusers also computes the frequencies on the model's device, whose exp may differ from the CPU's in the last bit; here they
# are the CPU's on every device. At t = 1000 that is up to 1.8e-5 of a feature, on a GPU only.
FLAVOURS = {
    "official": Flavour(timestep_frequency_divisor=128, mlp_norm_eps=1e-6, guidance_channels=3),
    "diffusers": Flavour(timestep_frequency_divisor=127, mlp_norm_eps=1e-5, guidance_channels=None),
}

_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
HEADS_OF_WIDTH = {hidden_size: num_heads for _, hidden_size, num_heads in _SIZES.values()}
_PATCHES = (2, 4, 8)
MODEL_NAMES = tuple(f"DiT-{size}/{patch}" for size in _SIZES for patch in _PATCHES)


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT.

    Args:
        depth: number of blocks.
        hidden_size: width D; a multiple of 4 (2-D sine and cosine positions) and of ``num_heads``.
        num_heads: attention heads.
        patch_size: side of a square patch, in latent pixels.
        input_size: latent height and width, an int or a pair; each a multiple of ``patch_size``.
        in_channels: latent channels C.
        num_classes: classes; the null class of classifier-free guidance comes on top.
        learn_sigma: the model also predicts a variance, so it returns 2C channels.
        mlp_ratio: MLP width over ``hidden_size``.
        class_dropout_prob: how often training replaces the label by the null class; 0 leaves the null class out.
        conditioning: one of ``in_context``, ``cross_attention``, ``adaln``, ``adaln_zero``.
        flavour: whose arithmetic the weights were trained with: ``official``, ``diffusers`` or any other ``Flavour``.
        prediction: what the weights were trained to predict: ``epsilon``, the noise; ``x0``, the clean image; ``v``
            (Salimans & Ho 2022); or ``velocity``, flow matching's. Solvers read it; no forward does.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and what is allowed.
    """

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    input_size: int | tuple[int, int] = 32
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    conditioning: str = "adaln_zero"
    flavour: str | Flavour = "official"
    prediction: str = "epsilon"

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        image_size: int | tuple[int, int] | None = None,
        input_size: int | tuple[int, int] | None = None,
        **fields: object,
    ) -> DiTConfig:
        """One of the paper's models: ``DiTConfig.from_name("DiT-XL/2", image_size=256)``.

        Args:
            name: one of ``MODEL_NAMES``.
            image_size: pixels, of which the VAE keeps one in eight along each side; 256 unless ``input_size`` is given.
            input_size: the latent size itself (pixel-space models: the image size).
            fields: any other field of ``DiTConfig``; it may replace one that the name stands for (``depth=2``).
        """
        if not isinstance(name, str) or name not in MODEL_NAMES:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(MODEL_NAMES)}")
        if image_size is not None and input_size is not None:
            raise ValueError(f"give image_size or input_size, not both: got image_size={image_size}, input_size={input_size}")
        if input_size is None:
            height, width = _pair("image_size", 256 if image_size is None else image_size)
            if height % 8 or width % 8:
                raise ValueError(f"image_size: got {image_size}, expected multiples of 8 (the VAE's downsampling)")
            input_size = (height // 8, width // 8)
        size, patch = name.removeprefix("DiT-").split("/")
        depth, hidden_size, num_heads = _SIZES[size]
        named = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": int(patch)}
        return cls(input_size=input_size, **(named | fields))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name, given in vars(self).copy().items():
            object.__setattr__(self, name, _pythons(given))
        for field in ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "num_classes"):
            _positive_int(field, getattr(self, field))
        if not isinstance(self.learn_sigma, bool):
            raise ValueError(f"learn_sigma: got {self.learn_sigma!r}, expected True or False")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: got {self.hidden_size}, expected a multiple of num_heads={self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size: got {self.hidden_size}, expected a multiple of 4 (2-D sine and cosine positions)")
        height, width = _pair("input_size", self.input_size)
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"input_size: got {self.input_size}, expected multiples of patch_size={self.patch_size}")
        object.__setattr__(self, "input_size", height if height == width else (height, width))
        _real("mlp_ratio", self.mlp_ratio)
        if self.mlp_hidden_size < 1:
            raise ValueError(f"mlp_ratio: got {self.mlp_ratio}, expected at least 1/hidden_size")
        _real("class_dropout_prob", self.class_dropout_prob)
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob: got {self.class_dropout_prob}, expected 0 <= p < 1")
        if not isinstance(self.conditioning, str) or self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning: got {self.conditioning!r}, expected one of {', '.join(CONDITIONINGS)}")
        object.__setattr__(self, "flavour", _flavour(self.flavour))
        if not isinstance(self.prediction, str) or self.prediction not in (*PREDICTIONS, VELOCITY):
            raise ValueError(f"prediction: got {self.prediction!r}, expected one of {', '.join((*PREDICTIONS, VELOCITY))}")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a file or a run's record holds them: without ``prediction``, where it is the usual one.

        So what earlier versions wrote means the same, and compares equal.
        """
        fields = asdict(self)
        return fields if self.prediction != "epsilon" else {k: v for k, v in fields.items() if k != "prediction"}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latent."""
        return (self.in_channels, *_pair("input_size", self.input_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and the width."""
        _, height, width = self.input_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def patch_out_features(self) -> int:
        """Width of the output linear: p * p * out_channels."""
        return self.patch_size**2 * self.out_channels

    @property
    def modulation_vectors(self) -> int:
        """Vectors of width D that each block's adaLN linear returns: 6, 4 or none."""
        return {"adaln_zero": 6, "adaln": 4}.get(self.conditioning, 0)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.num_classes

    @property
    def has_null_class(self) -> bool:
        """True if training drops labels, so that the label table has a row for no class and guidance can be used."""
        return self.class_dropout_prob > 0

    @property
    def label_rows(self) -> int:
        """Rows of the label table, with that of the null class."""
        return self.num_classes + self.has_null_class

    @property
    def arithmetic(self) -> Flavour:
        return FLAVOURS[self.flavour] if isinstance(self.flavour, str) else self.flavour

    @property
    def guidance_channels(self) -> int:
        """How many of the first channels classifier-free guidance acts on by default."""
        channels = self.arithmetic.guidance_channels
        return self.in_channels if channels is None else min(channels, self.in_channels)


def check_config(config: object) -> None:
    """Raise TypeError unless a value is a ``DiTConfig``; the message says how to get one."""
    if isinstance(config, DiTConfig):
        return
    hint = ""
    if isinstance(config, str):
        hint = f"; DiTConfig.from_name({config!r}) makes one"
    elif isinstance(getattr(config, "config", None), DiTConfig):
        hint = ", such as the model's own: pass model.config"
    raise wrong_type("config", config, f"a ditfast.DiTConfig{hint}")


def _pythons(value: object) -> object:
    """Return numbers of NumPy, also in a pair, as Python's, which JSON can hold."""
    if type(value) is tuple:
        return tuple(map(_pythons, value))
    if type(value) is list:
        return list(map(_pythons, value))
    return value.item() if isinstance(value, np.generic) else value


def _positive_int(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field}: got {value!r}, expected a positive integer")


def _real(field: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{field}: got {value!r}, expected a finite number")


def _flavour(value: object) -> str | Flavour:
    """By its name if it has one, so that equal flavours are equal configs; a list is how JSON brings it."""
    if isinstance(value, str) and value in FLAVOURS:
        return value
    if not isinstance(value, (tuple, list)) or len(value) != len(Flavour._fields):
        raise ValueError(f"flavour: got {value!r}, expected one of {', '.join(FLAVOURS)}, or a Flavour")
    flavour = Flavour(*value)
    _positive_int("flavour.timestep_frequency_divisor", flavour.timestep_frequency_divisor)
    _real("flavour.mlp_norm_eps", flavour.mlp_norm_eps)
    if flavour.mlp_norm_eps <= 0:
        raise ValueError(f"flavour.mlp_norm_eps: got {flavour.mlp_norm_eps}, expected a positive number")
    if flavour.guidance_channels is not None:
        _positive_int("flavour.guidance_channels", flavour.guidance_channels)
    return next((name for name, known in FLAVOURS.items() if known == flavour), flavour)


def _pair(field: str, value: object) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{field}: got {value!r}, expected a positive integer or a (height, width) pair of them")
    for side in pair:
        _positive_int(field, side)
    return pair[0], pair[1]
