"""How models and pipelines are saved and read back: the version, the names of classes, the code for those without this package."""
