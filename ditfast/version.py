"""The version of ditfast."""

__version__ = "0.1.0"
