"""Benchmarks: `python -m bench faces` and `python -m bench loss`, from a checkout of the repository."""
