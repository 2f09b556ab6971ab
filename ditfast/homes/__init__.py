"""The families of models that ``ditfast.accelerate`` knows: how each is built, and its forward on the fused ops.

A new one is a ``Home`` in a file of its own, and a name in one of these lists. The first that fits is taken.
"""

from .diffusers_dit import DiffusersBlock, DiffusersModel
from .diffusers_sites import JointBlock, PixArtBlock, PixArtInputs, SD3Inputs
from .home import NOTE, Home, ModelInputs, Options, Swap, swap_in
from .int8 import cost_of_int8
from .official import OfficialBlock, OfficialModel

BLOCKS: tuple[Home, ...] = (OfficialBlock(), DiffusersBlock(), PixArtBlock(), JointBlock())
MODELS: tuple[Home, ...] = (
    OfficialModel("official DiT", returns_variance=True),
    OfficialModel("SiT", returns_variance=False),
    DiffusersModel(),
)
INPUTS: tuple[ModelInputs, ...] = (*MODELS, PixArtInputs(), SD3Inputs())

__all__ = ["BLOCKS", "INPUTS", "MODELS", "NOTE", "Home", "Options", "Swap", "cost_of_int8", "swap_in"]
