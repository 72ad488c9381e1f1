"""The pool of pathos; see `ostap_parallel.faces.pathos_pool`."""

from ostap_parallel.faces.pathos_pool import ParallelPool, Result, stats

__all__ = ["ParallelPool", "Result", "stats"]
