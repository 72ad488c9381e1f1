"""Random numbers: of an item, from the seed of the run and its position; of a fork, its own."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import random
import sys
import threading
from collections.abc import Iterable
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.objects.kinds import names_of


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


def seed_item(seed: int | str, index: int) -> None:
    """Seed ``random`` and, where loaded, numpy and libraries from `seed` and an item's index."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    begin(digest)
    random.seed(digest)
    if "numpy.random" in sys.modules:
        words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]
        sys.modules["numpy.random"].seed(words)
    for support in libraries.present().values():
        support.seed(digest)


def prepare(is_seeded: bool, is_ours: bool) -> None:
    """Make ready for the items of a run, in a worker of ours or in a process of others."""
    if is_seeded:
        # Loaded now: a task that imports it later must find it seeded for its first item.
        with contextlib.suppress(ImportError):
            import numpy.random  # type: ignore[import-not-found,unused-ignore] # noqa: F401
        libraries.watch(_seed_arrived)  # those that take longer
    elif is_ours and _current.digest is not None:
        begin(None)
        differ(())  # a run with a seed has left what recurs


def _seed_arrived(support: libraries.Support) -> None:
    support.seed(_current.digest)


def take_in(support: libraries.Support) -> None:
    """Have a library in this worker that was just imported, by whomever."""
    support.arrive()
    support.seed(_current.digest)


def find() -> list[Any]:
    """Return the generators of random numbers that modules have made for themselves."""
    kinds: tuple[type, ...] = (random.Random,)
    if "numpy.random" in sys.modules:
        kinds = (*kinds, sys.modules["numpy.random"].Generator)
    found: dict[int, Any] = {}
    for module in list(sys.modules.values()):
        values = list(names_of(module).values())
        found.update((id(one), one) for one in values if issubclass(type(one), kinds))
    # not isinstance, which asks what stands for something else
    found.update((id(one), one) for one in gc.get_objects() if issubclass(type(one), kinds))
    return list(found.values())


def differ(generators: Iterable[Any]) -> None:
    """Have generators, and those of the libraries, give what does not recur."""
    random.seed()
    for generator in generators:
        with contextlib.suppress(Exception):
            if isinstance(generator, random.Random):
                generator.seed()
            else:  # numpy's
                bits = generator.bit_generator
                bits.state = type(bits)().state
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()
    for support in libraries.present().values():
        support.seed(None)
