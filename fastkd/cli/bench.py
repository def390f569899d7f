"""`fastkd bench [stem …]`: the bench is a package of its own; this is its door."""

from fastkd.bench.run import main

__all__ = ["main"]
