"""The package's version, also in the code that repositories bring along."""

__version__ = "0.1.0"
