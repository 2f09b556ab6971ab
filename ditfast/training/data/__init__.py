"""What a model is trained on: records, and the batches that each rank gets of them."""

from .digits import Digits
from .images import ImageFolder
from .latents import Latents
from .open import open_data
from .pairs import Pairs, as_data
from .records import BadRecord, Data, DataError, Record
from .stream import Batch, Stream

__all__ = [
    "BadRecord",
    "Batch",
    "Data",
    "DataError",
    "Digits",
    "ImageFolder",
    "Latents",
    "Pairs",
    "Record",
    "Stream",
    "as_data",
    "open_data",
]
