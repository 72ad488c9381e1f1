"""The random generator of an item, made from the seed of the run and the item's position."""

from __future__ import annotations

import threading
from typing import Any


class _Current(threading.local):
    """What this thread has: executors of somebody else's run items in several."""

    def __init__(self) -> None:
        self.digest: bytes | None = None
        self.generator: Any = None


_current = _Current()


def begin(digest: bytes | None) -> None:
    """Have an item with this digest of seed and position begin; ``None``: there is no seed."""
    _current.digest, _current.generator = digest, None


def end() -> None:
    """Have an item without a seed begin; what it has of a generator stays if it has none, too."""
    if _current.digest is not None:
        begin(None)


def rng() -> Any:
    """Return numpy's random generator of the item that runs, the same one during the item.

    With ``seed=`` of the run it depends on that and on the item's position only, whatever the
    number of workers. Without it, and outside of tasks, it is a fresh one.
    """
    import numpy.random  # type: ignore[import-not-found,unused-ignore]

    if _current.generator is None:
        digest = _current.digest
        seed = None if digest is None else int.from_bytes(digest, "big")
        _current.generator = numpy.random.default_rng(seed)
    return _current.generator
