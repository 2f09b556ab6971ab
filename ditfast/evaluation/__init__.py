"""How good images are: against real digits on a classifier trained here, against others on Inception's features."""

from .command import EXAMPLES
from .command import add_arguments as add_arguments  # for the command
from .command import run as run
from .compare import compare, compare_with_digits
from .errors import EvaluationError
from .image_set import ImageSet, open_images
from .inception import Inception
from .metrics import Gaussian, frechet_distance, gaussian, inception_score, precision_recall
from .report import Report, Score

__all__ = [
    "EXAMPLES",
    "EvaluationError",
    "Gaussian",
    "ImageSet",
    "Inception",
    "Report",
    "Score",
    "compare",
    "compare_with_digits",
    "frechet_distance",
    "gaussian",
    "inception_score",
    "open_images",
    "precision_recall",
]
