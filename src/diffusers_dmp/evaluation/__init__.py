"""Sampling at scale, metrics with their fingerprints, diagnostics and costs."""
