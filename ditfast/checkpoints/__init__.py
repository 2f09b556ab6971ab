"""DiT weights on disk: the official layout and diffusers', told apart, checked, loaded, saved and converted."""

from .errors import CheckpointError
from .layouts import LAYOUTS
from .load import load_checkpoint
from .save import save_checkpoint
from .source import CheckpointSource, differences
from .wrappers import WEIGHTS

__all__ = ["LAYOUTS", "WEIGHTS", "CheckpointError", "CheckpointSource", "differences", "load_checkpoint", "save_checkpoint"]
