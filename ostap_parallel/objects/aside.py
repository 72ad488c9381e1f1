"""Large arrays that travel beside what refers to them, once for all who need it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

# Bytes of an array from which on it travels aside.
LEAST = 1 << 20


class Aside:
    """Takes large arrays out of what is pickled in this context.

    Attributes
    ----------
    arrays
        What was taken, each once.
    """

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self._places: dict[int, int] = {}

    def reduce(self, obj: Any) -> Any:
        """Return what stands for an array, or ``None``: it is small, or of another kind."""
        # Those of subclasses, such as masked arrays, have parts of their own.
        if (type(obj).__module__, type(obj).__name__) != ("numpy", "ndarray"):
            return None
        whole = obj.flags.c_contiguous or obj.flags.f_contiguous
        if obj.nbytes < LEAST or obj.dtype.hasobject or not whole:
            return None
        if id(obj) not in self._places:  # which `arrays` keeps alive
            self._places[id(obj)] = len(self.arrays)
            self.arrays.append(obj)
        return _find, (self._places[id(obj)],)


taking: ContextVar[Aside | None] = ContextVar("taking", default=None)
_there: ContextVar[Sequence[Any]] = ContextVar("there", default=())


@contextlib.contextmanager
def take() -> Iterator[Aside]:
    """Have arrays taken out of what is pickled in the block."""
    taken = Aside()
    token = taking.set(taken)
    try:
        yield taken
    finally:
        taking.reset(token)


@contextlib.contextmanager
def give(arrays: Sequence[Any]) -> Iterator[None]:
    """Have what is unpickled in the block find the arrays that were taken out of it."""
    token = _there.set(arrays)
    try:
        yield
    finally:
        _there.reset(token)


def _find(place: int) -> Any:
    return _there.get()[place]
