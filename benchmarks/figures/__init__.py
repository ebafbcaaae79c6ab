"""The paper's figures, on models that are at hand: `python -m benchmarks.figures` writes tables and plots."""
