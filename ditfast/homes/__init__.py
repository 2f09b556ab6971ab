"""The families of models that ``ditfast.accelerate`` knows: how each is built, and its forward on the fused ops.

A new one is a ``Home`` in a file of its own, and a name in one of these lists. The first that fits is taken.
"""

from .diffusers_dit import DiffusersBlock, DiffusersModel
from .diffusers_sites import JointBlock, PixArtBlock
from .home import Home, Mismatch, Options, Swap
from .int8 import cost_of_int8, why_not_int8
from .official import OfficialBlock, OfficialModel
from .probe import in_one_line, probe

BLOCKS: tuple[Home, ...] = (OfficialBlock(), DiffusersBlock(), PixArtBlock(), JointBlock())
MODELS: tuple[Home, ...] = (
    OfficialModel("official DiT", returns_variance=True),
    OfficialModel("SiT", returns_variance=False),
    DiffusersModel(),
)

__all__ = ["BLOCKS", "MODELS", "Home", "Mismatch", "Options", "Swap", "cost_of_int8", "in_one_line", "probe", "why_not_int8"]
