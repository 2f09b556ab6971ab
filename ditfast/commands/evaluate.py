"""``ditfast evaluate``"""

from ..evaluation import EXAMPLES, add_arguments, run

__all__ = ["DESCRIPTION", "EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "how good images are: Frechet distance, precision, recall, Inception score"
DESCRIPTION = "Compares a folder of images, or an .npz file of them, with real ones."
