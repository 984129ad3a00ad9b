"""Figures, measured in one run: ``python -m benchmarks.<name>``. They need the test extra."""
