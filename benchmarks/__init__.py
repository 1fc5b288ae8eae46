"""Ratios against the alternatives, measured side by side: `python -m benchmarks <system>`."""
