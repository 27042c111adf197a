"""zeolith beside its peers, measured: ``python -m tests.bench.compare``."""
