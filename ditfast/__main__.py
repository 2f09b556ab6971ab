"""``python -m ditfast``, which is how torchrun starts it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
