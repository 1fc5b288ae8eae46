"""Compare all systems on equal terms, on real images: `python -m benchmarks.comparison`, or `make compare`."""
