"""Saving and loading: the version, the names of classes, code files for those without this package, old import paths."""
