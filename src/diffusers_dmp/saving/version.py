"""The package's version, which saved configurations and the code files in repositories name."""

__version__ = "0.4.0.dev0"
