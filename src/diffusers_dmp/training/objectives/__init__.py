"""Objectives: how samples are noised for training, and the loss of what a model makes of them."""
