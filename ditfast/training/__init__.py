"""Training: the paper's recipe, the same random numbers on one rank or many, runs that resume."""

from .checkpoints import CheckpointFault
from .data import Data, DataError, Digits, open_data
from .errors import RunError, TrainingStopped
from .history import History, read_history
from .settings import RunOptions, TrainSettings
from .trainer import Trainer

__all__ = [
    "CheckpointFault",
    "Data",
    "DataError",
    "Digits",
    "History",
    "RunError",
    "RunOptions",
    "TrainSettings",
    "Trainer",
    "TrainingStopped",
    "open_data",
    "read_history",
]
