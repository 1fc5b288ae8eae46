"""Time ratios of the systems to their alternatives, measured side by side: `python -m benchmarks <system>`."""
